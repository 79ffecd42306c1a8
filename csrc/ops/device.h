// What every op on a GPU does before its launches.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "lmkv/gpu.h"

namespace lmkv {

// The current device is `index` while this lives. The CUDA runtime is linked into this library, so torch's guard, which
// restores what was before, does not speak for it: it is told as well.
class OnDevice {
  public:
    explicit OnDevice(int32_t index) : guard_(index), index_(index) { LMKV_GPU_CHECK(LMKV_GPU(SetDevice)(index)); }

    int32_t index() const { return index_; }

    // torch's current stream there.
    void* stream() const {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
        return stream;
    }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    int32_t index_;
};

// Raises unless the tensor is on the GPU `index`.
inline void check_device(const torch::stable::Tensor& t, const char* name, int32_t index) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == index, name, " is not on GPU ", index,
                    " like the source · move it there");
}

} // namespace lmkv
