// llama.h, and the functions of libllama that MTP needs but llama.h does not declare.
//
// libllama exports them with C++ linkage (they stand in its src/llama-ext.h). Their ABI is that of
// the pinned llama-cpp-python, which is why another version is refused at import.
#pragma once

#include "llama.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

// The context keeps the hidden row that feeds an MTP head: of every row of a batch, in batch
// order, or if `masked` of outputs alone. The MTP graphs of some architectures keep all rows, those
// of others outputs alone: the wrong setting gives wrong rows, or aborts, unless all rows are outputs.
void    llama_set_embeddings_nextn(llama_context * ctx, bool value, bool masked);
float * llama_get_embeddings_nextn(llama_context * ctx);
float * llama_get_embeddings_nextn_ith(llama_context * ctx, int32_t i);

// Of several chained heads, the one that an MTP context runs from now on.
void llama_set_nextn_layer_offset(llama_context * ctx, int32_t offset);

// The tensors of a model, by name.
const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);

// What a model, a context and its computations take, in bytes, by the type of their buffers. Of a
// model loaded with no_alloc: would take.
struct llama_memory_breakdown_data {
    size_t model, context, compute;
};
std::map<ggml_backend_buffer_type_t, llama_memory_breakdown_data> llama_get_memory_breakdown(const llama_context * ctx);
