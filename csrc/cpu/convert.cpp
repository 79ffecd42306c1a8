#include "convert.h"

#include <memory>
#include <new>

#include "isa.h"

namespace lmkv::cpu {
namespace {

constexpr int64_t kGrainBytes = 256 << 10;
// What is larger than this would only push out of the caches what others have there.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr std::align_val_t kLine{64};

int64_t widest_row_bytes(const Convert& c) {
    const int64_t dims = c.parts == 2 && c.dims[1] > c.dims[0] ? c.dims[1] : c.dims[0];
    const int from = width_of(c.source_type), to = width_of(c.target_type);
    return dims * (from > to ? from : to);
}

} // namespace

Work plan(const Convert& c, const ConvertData& d) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < d.segment_count; ++i) tokens += d.segments[i].tokens;
    const int64_t token_bytes = (c.dims[0] + int64_t{c.dims[1]}) * c.heads * width_of(c.target_type);
    const int64_t bytes = tokens * token_bytes * d.layers;
    const int64_t units = d.segment_count * d.layers;
    const int64_t unit_bytes = units > 0 ? bytes / units : 0;
    return {units, unit_bytes > 0 ? (kGrainBytes + unit_bytes - 1) / unit_bytes : 1, bytes >= kStreamBytes};
}

void convert(const Convert& c, const ConvertData& d, const Work& work, int64_t lo, int64_t hi) {
    static UnitFn* const unit = best_isa().convert_unit;
    const auto free = [](uint8_t* p) { ::operator delete[](p, kLine); };
    const int64_t buffer_bytes = tile_tokens(widest_row_bytes(c)) * widest_row_bytes(c);
    const std::unique_ptr<uint8_t[], decltype(free)> scratch(
        static_cast<uint8_t*>(::operator new[](static_cast<size_t>(2 * buffer_bytes), kLine)), free);
    for (int64_t i = lo; i < hi; ++i) unit(c, d, i, work.stream, scratch.get());
#if defined(__x86_64__)
    _mm_sfence(); // streamed stores are visible to whom the caller tells next
#endif
}

} // namespace lmkv::cpu
