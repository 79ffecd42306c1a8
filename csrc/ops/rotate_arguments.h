// From the arguments of rotate_keys to Rotate and RotateData. Everything is checked here; kernels trust what they get.
#pragma once

#include "arguments.h"
#include "lmkv/rotate.h"

namespace lmkv {

struct RotateRequest {
    Rotate rotate;
    RotateData data;
};

inline const Run* run_rows(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Int && t.dim() == 2 &&
                        t.size(1) == 4 && t.is_contiguous(),
                    "runs must be a contiguous int32 CPU tensor of 4 columns");
    return static_cast<const Run*>(t.data_ptr());
}

// Raises unless all runs and layers lie within the tensor, aligned to the elements.
inline void check_keys(const Tensor& keys, const Rotate& r, const RotateData& d, int64_t turn_count) {
    const int64_t width = width_of(r.type);
    int64_t block = 0, token = 0;
    for (int64_t i = 0; i < d.run_count; ++i) {
        const Run& run = d.runs[i];
        STD_TORCH_CHECK(run.block >= 0 && run.token >= 0 && run.tokens >= 1 && run.turn >= 0 && run.turn < turn_count,
                        "run ", i, " has a negative field, no tokens, or none of the ", turn_count, " turns");
        const int64_t last = int64_t{run.token} + run.tokens - 1;
        block = run.block > block ? run.block : block;
        token = last > token ? last : token;
    }
    const int64_t dims = int64_t{r.first} + 2 * int64_t{r.pairs};
    const int64_t last = area_offset(r.map, block, r.heads - 1) + largest(token, r.map.n1, r.map.n0, r.map.tn) +
                         largest(dims - 1, r.map.d1, r.map.d0, r.map.td);
    for (int64_t i = 0; i < d.layer_count && d.run_count > 0; ++i) {
        STD_TORCH_CHECK(d.layers[i] >= 0 && d.layers[i] + (last + 1) * width <= keys.numel(), "keys of ", keys.numel(),
                        " bytes are too small: layer ", i, " at ", d.layers[i], " reaches ", (last + 1) * width,
                        " bytes for block ", block, ", token ", token);
        STD_TORCH_CHECK((reinterpret_cast<uintptr_t>(d.keys) + d.layers[i]) % width == 0, "layer ", i, " at byte ",
                        d.layers[i], " is not aligned to its elements of ", width, " bytes");
    }
}

inline RotateRequest parse(const Tensor& keys, const Tensor& layers, const Ints& map, const Tensor& runs,
                           const Tensor& turns, const Ints& shape, int64_t type) {
    RotateRequest request{};
    Rotate& r = request.rotate;
    RotateData& d = request.data;
    check_bytes(keys, "keys");
    STD_TORCH_CHECK(shape.size() == 4, "shape has ", shape.size(), " fields, not 4");
    STD_TORCH_CHECK(type >= 0 && type <= 2, "keys are turned in bfloat16, float16 and float32 only");
    STD_TORCH_CHECK(shape[0] >= 1 && shape[1] >= 0 && shape[2] >= 1, "heads and pairs start at 1, dimensions at 0");
    r.map = part_maps(map, 1, "keys'")[0];
    r.type = static_cast<Type>(type);
    r.heads = static_cast<int32_t>(shape[0]);
    r.first = static_cast<int32_t>(shape[1]);
    r.pairs = static_cast<int32_t>(shape[2]);
    r.interleaved = shape[3] != 0;
    STD_TORCH_CHECK(turns.scalar_type() == torch::headeronly::ScalarType::Float && turns.dim() == 3 &&
                        turns.size(1) == 2 && turns.size(2) == shape[2] && turns.is_contiguous() &&
                        turns.device() == keys.device(),
                    "turns must be a contiguous float32 tensor [turns, 2, ", shape[2], "] on the keys' device");
    d.keys = static_cast<uint8_t*>(keys.data_ptr());
    d.layers = layer_offsets(layers, "layers");
    d.layer_count = layers.numel();
    d.runs = run_rows(runs);
    d.run_count = runs.size(0);
    d.turns = static_cast<const float*>(turns.data_ptr());
    check_keys(keys, r, d, turns.size(0));
    return request;
}

} // namespace lmkv
