// From the arguments of checksum_runs to a plan. Everything is checked here; kernels trust what they get.
#pragma once

#include "arguments.h"
#include "lmkv/runs.h"

namespace lmkv {

struct RunsRequest {
    const uint8_t* data;
    uint64_t* sum;
    WordPlan plan;
};

inline RunsRequest parse_runs(const Tensor& data, const Tensor& runs, int64_t first, Tensor& sum) {
    check_bytes(data, "data");
    STD_TORCH_CHECK(runs.is_cpu() && runs.scalar_type() == torch::headeronly::ScalarType::Long && runs.dim() == 2 &&
                        runs.size(1) == 2 && runs.is_contiguous(),
                    "runs must be a contiguous int64 CPU tensor of shape (R, 2)");
    STD_TORCH_CHECK(
        sum.scalar_type() == torch::headeronly::ScalarType::Long && sum.numel() == 1 && sum.device() == data.device(),
        "sum must be an int64 tensor of one element on the device of data");
    STD_TORCH_CHECK(first >= 0, "the first word has the negative index ", first);
    const auto* rows = static_cast<const ByteRun*>(runs.data_ptr());
    for (int64_t i = 0; i < runs.size(0); ++i) {
        const ByteRun& r = rows[i];
        STD_TORCH_CHECK(r.offset >= 0 && r.bytes >= 0 && r.offset <= data.numel() && r.bytes <= data.numel() - r.offset,
                        "run ", i, " of ", r.bytes, " bytes at ", r.offset, " does not lie within ", data.numel(),
                        " bytes");
    }
    return {static_cast<const uint8_t*>(data.data_ptr()), static_cast<uint64_t*>(sum.data_ptr()),
            plan_words(rows, runs.size(0), static_cast<uint64_t>(first))};
}

} // namespace lmkv
