// Stands between mtpbatch's native part and what it calls, and fails on command.
//
// The dynamic linker finds these functions first if this library is preloaded. The native part is the
// released one: it knows nothing of them.
#include "ggml.h"
#include "llama.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

namespace {

enum Point { PROCESS, SEQ_RM, STATE_GET, STATE_SET, NEW, N_POINTS };
enum Way {
    ANSWERS = 0,  // with the code given, and does nothing
    RUNS    = 1,  // before it fails
    THROWS  = 2,
    HANGS   = 4,  // until it is released; then it does what it should
};

struct Fault {
    std::atomic<int64_t> nth{ -1 };  // of the calls from now on: the first that fails
    std::atomic<int64_t> count{ 0 };
    std::atomic<int>     code{ 0 }, way{ 0 };
    std::atomic<int64_t> least{ 0 };  // of NEW: bytes
    std::atomic<int64_t> calls{ 0 }, fired{ 0 };

    bool fires() {
        if (nth < 0) {
            return false;
        }
        const int64_t call = calls++;
        const bool    now  = call >= nth && call < nth + count;
        fired += now;
        return now;
    }
};

Fault                   faults[N_POINTS];
std::mutex              mutex;
std::condition_variable released;
bool                    open_gate = false;
std::atomic<int>        n_hanging{ 0 };
// Where the native part is in memory.
std::atomic<uintptr_t> begin_of_part{ 0 }, end_of_part{ 0 };

// The path of a library that is loaded, by a part of it.
std::string path_of(const char * part) {
    std::pair<const char *, std::string> search{ part, "" };
    dl_iterate_phdr(
        [](dl_phdr_info * info, size_t, void * data) {
            auto & [wanted, found] = *static_cast<decltype(search) *>(data);
            if (std::strstr(info->dlpi_name, wanted)) {
                found = info->dlpi_name;
            }
            return 0;
        },
        &search);
    return search.second;
}

template <typename Function>
Function * real(const char * name, const char * part_of_path = "/libllama.") {
    void * const library = dlopen(path_of(part_of_path).c_str(), RTLD_NOLOAD | RTLD_NOW);
    void * const found   = library ? dlsym(library, name) : nullptr;
    if (!found) {
        abort();
    }
    return reinterpret_cast<Function *>(found);
}

// What ggml does where it can do nothing else. The file that the environment names says that this has to
// happen, and is gone by then: once, in whichever process comes there first.
void abort_if_asked() {
    static const char * const file = getenv("FAULTS_ABORT");
    if (file && unlink(file) == 0) {
        real<decltype(ggml_abort)>("ggml_abort", "/libggml-base.")(__FILE__, __LINE__, "injected");
    }
}

void hang() {
    std::unique_lock lock(mutex);
    n_hanging += 1;
    released.wait(lock, [] { return open_gate; });
    n_hanging -= 1;
}

// What a call gives that fails, or what it gives otherwise.
template <typename Result, typename Call>
Result disturbed(Point point, Call && call) {
    Fault & fault = faults[point];
    if (!fault.fires()) {
        return call();
    }
    const int way = fault.way;
    if (way & HANGS) {
        hang();
        return call();
    }
    if (way & RUNS) {
        call();
    }
    if (way & THROWS) {
        throw std::runtime_error("injected");
    }
    return static_cast<Result>(fault.code.load());
}

bool comes_from_part(const void * address) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return at >= begin_of_part && at < end_of_part;
}

void * allocate(size_t size, const void * caller) {
    Fault & fault = faults[NEW];
    if (fault.nth >= 0 && static_cast<int64_t>(size) >= fault.least && comes_from_part(caller) && fault.fires()) {
        throw std::bad_alloc();
    }
    if (void * memory = malloc(size > 0 ? size : 1)) {
        return memory;
    }
    throw std::bad_alloc();
}

int find_part(dl_phdr_info * info, size_t, void *) {
    if (!std::strstr(info->dlpi_name, "mtpbatch/native/_ffi")) {
        return 0;
    }
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto & header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && (header.p_flags & PF_X)) {
            begin_of_part = info->dlpi_addr + header.p_vaddr;
            end_of_part   = begin_of_part + header.p_memsz;
        }
    }
    return 1;
}

}  // namespace

void * operator new(size_t size) {
    return allocate(size, __builtin_return_address(0));
}
void * operator new[](size_t size) {
    return allocate(size, __builtin_return_address(0));
}
void * operator new(size_t size, const std::nothrow_t &) noexcept {
    try {
        return allocate(size, __builtin_return_address(0));
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}
void operator delete(void * memory) noexcept {
    free(memory);
}
void operator delete[](void * memory) noexcept {
    free(memory);
}
void operator delete(void * memory, size_t) noexcept {
    free(memory);
}
void operator delete[](void * memory, size_t) noexcept {
    free(memory);
}

extern "C" {

// What a test calls.

// Of the calls from now on `count` fail, from the nth on, the next one being 0; false: the native part
// is not there.
bool faults_arm(int point, int64_t nth, int64_t count, int code, int way, int64_t least) {
    Fault & fault = faults[point];
    fault.nth     = -1;
    if (dl_iterate_phdr(find_part, nullptr) == 0) {
        return false;
    }
    fault.count = count;
    fault.code  = code;
    fault.way   = way;
    fault.least = least;
    fault.calls = fault.fired = 0;
    {
        const std::lock_guard lock(mutex);
        open_gate = false;
    }
    fault.nth = nth;
    return true;
}

void faults_disarm(int point) {
    faults[point].nth = -1;
}

int64_t faults_fired(int point) {
    return faults[point].fired;
}

int faults_hanging() {
    return n_hanging;
}

void faults_release() {
    const std::lock_guard lock(mutex);
    open_gate = true;
    released.notify_all();
}

// What mtpbatch calls.

int32_t llama_process(llama_context * ctx, llama_process_type type, llama_batch_ext * batch) {
    static auto * const process = real<decltype(llama_process)>("llama_process");
    abort_if_asked();
    return disturbed<int32_t>(PROCESS, [&] { return process(ctx, type, batch); });
}

bool llama_memory_seq_rm(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    static auto * const remove = real<decltype(llama_memory_seq_rm)>("llama_memory_seq_rm");
    return disturbed<bool>(SEQ_RM, [&] { return remove(memory, seq_id, p0, p1); });
}

size_t llama_state_seq_get_data_ext(llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id seq_id,
                                    llama_state_seq_flags flags) {
    static auto * const get = real<decltype(llama_state_seq_get_data_ext)>("llama_state_seq_get_data_ext");
    return disturbed<size_t>(STATE_GET, [&] { return get(ctx, dst, size, seq_id, flags); });
}

size_t llama_state_seq_set_data_ext(llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq_id,
                                    llama_state_seq_flags flags) {
    static auto * const set = real<decltype(llama_state_seq_set_data_ext)>("llama_state_seq_set_data_ext");
    return disturbed<size_t>(STATE_SET, [&] { return set(ctx, src, size, seq_id, flags); });
}

}  // extern "C"
