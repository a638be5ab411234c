// llama.h, and the functions of libllama that MTP needs but llama.h does not declare.
//
// libllama exports them with C++ linkage (they stand in its src/llama-ext.h). Their ABI is that of
// the pinned llama-cpp-python, which is why another version is refused at import.
#pragma once

#include "llama.h"

// The context keeps the hidden row that feeds an MTP head: of every row of a batch, in batch
// order, if not `masked`. (Masked rows are those of the first n outputs, which are the wrong ones
// for MTP graphs whenever some rows of a batch are not outputs.)
void    llama_set_embeddings_nextn(llama_context * ctx, bool value, bool masked);
float * llama_get_embeddings_nextn_ith(llama_context * ctx, int32_t i);
