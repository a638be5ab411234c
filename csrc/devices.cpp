// What llama.cpp can compute on.
#include "internal.hpp"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdio>

namespace mtpbatch {

namespace {

// The CPU, then those with a memory of their own. What else ggml calls a device, such as BLAS,
// works in the CPU's.
const std::vector<ggml_backend_dev_t> & devices() {
    static const std::vector<ggml_backend_dev_t> found = [] {
        std::vector<ggml_backend_dev_t> list{ ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) };
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t device = ggml_backend_dev_get(i);
            const auto         type   = ggml_backend_dev_type(device);
            if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
                list.push_back(device);
            }
        }
        return list;
    }();
    return found;
}

}  // namespace

int32_t device_of(ggml_backend_buffer_type_t type) {
    if (ggml_backend_buft_is_host(type)) {
        return 0;
    }
    const auto & list  = devices();
    const auto   found = std::find(list.begin(), list.end(), ggml_backend_buft_get_device(type));
    return found == list.end() ? 0 : static_cast<int32_t>(found - list.begin());
}

}  // namespace mtpbatch

using namespace mtpbatch;

int32_t mtpbatch_device_count(void) {
    return static_cast<int32_t>(devices().size());
}

void mtpbatch_device_get(int32_t index, mtpbatch_device * device) {
    const ggml_backend_dev_t raw = devices()[index];
    size_t                   n_free, n_total;
    ggml_backend_dev_memory(raw, &n_free, &n_total);
    std::snprintf(device->name, sizeof device->name, "%s", ggml_backend_dev_name(raw));
    std::snprintf(device->description, sizeof device->description, "%s", ggml_backend_dev_description(raw));
    device->free_bytes  = n_free;
    device->total_bytes = n_total;
}

const char * mtpbatch_build_flags(void) {
    return llama_print_system_info();
}
