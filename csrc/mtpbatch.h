// The whole native interface of mtpbatch. Python sees exactly what stands between the cffi marks.
//
// Vocabulary: *_create/_load gives a handle that *_free takes back (NULL is harmless). Handles own
// what they are built on: a model outlives its contexts, contexts outlive their session and
// executor, whatever order they are freed in.
//
// Threads: any thread may call, one at a time for handles that share a target context and for one
// sampler. A model's const functions may be called from several threads at once.
//
// Errors: functions that can fail return a status and fill `error` with the reason in words. Unless
// a status says otherwise, a call that fails has changed nothing.
#ifndef MTPBATCH_H
#define MTPBATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

typedef enum mtpbatch_status {
    MTPBATCH_OK = 0,
    MTPBATCH_INVALID_ARGUMENT,  // a rule of this header was broken
    MTPBATCH_OUT_OF_MEMORY,
    MTPBATCH_LOAD_FAILED,     // the model file
    MTPBATCH_LOAD_CANCELLED,  // the progress callback said stop
    MTPBATCH_CONTEXT_FAILED,
    MTPBATCH_NO_KV_SLOT,     // decode: no free cells; memory is as before the call
    MTPBATCH_DECODE_FAILED,  // decode: the sequences in the batch, and with recurrent layers all, are lost
    MTPBATCH_SESSION_INIT,   // from here on: MTP session
    MTPBATCH_SESSION_CONFIG,
    MTPBATCH_SESSION_CONTEXTS,
    MTPBATCH_SESSION_SEQUENCE,
    MTPBATCH_SESSION_PROCESS,
    MTPBATCH_SESSION_DRAFT,
    MTPBATCH_SESSION_ACCEPT,
    MTPBATCH_SESSION_STATE,  // save, restore, fork
    MTPBATCH_INTERNAL,
} mtpbatch_status;

typedef struct mtpbatch_error {
    char message[1024];
} mtpbatch_error;

// --- devices -------------------------------------------------------------------------------------

// What llama.cpp can compute on. The first one is the CPU, whose memory is the machine's.
typedef struct mtpbatch_device {
    char     name[64];
    char     description[128];
    uint64_t free_bytes, total_bytes;  // 0: it does not say
} mtpbatch_device;

int32_t mtpbatch_device_count(void);
void    mtpbatch_device_get(int32_t index, mtpbatch_device * device);
// What llama.cpp was built with: back-ends, instruction sets and libraries.
const char * mtpbatch_build_flags(void);

// --- model ---------------------------------------------------------------------------------------

typedef struct mtpbatch_model mtpbatch_model;

// Called now and then while a model loads, with a fraction from 0 to 1; false stops the loading.
typedef bool (*mtpbatch_progress)(float fraction, void * user);

typedef struct mtpbatch_model_facts {
    int32_t  n_vocab;
    int32_t  n_embd;  // width of a hidden row
    int32_t  n_layer;
    int32_t  n_mtp_heads;  // 0: the model cannot draft
    int32_t  n_ctx_train;
    int32_t  n_swa;          // positions in a sliding window of attention; 0: there is none
    int32_t  bos, eos, eot;  // -1: the model has none
    bool     add_bos;
    bool     hybrid;     // attention and recurrent layers
    bool     recurrent;  // recurrent layers only
    uint64_t n_params;
    uint64_t n_bytes;
} mtpbatch_model_facts;

// Quiets llama.cpp's own output, which otherwise goes to stderr: errors are collected for the
// messages of this interface. With `forward` they are also passed on to whoever listened before.
void mtpbatch_capture_logs(bool forward);

// Without `weights` only what describes the model is read: it has a vocabulary and contexts, which
// say what memory they would take (mtpbatch_context_get_memory) but have none and do not decode.
mtpbatch_status mtpbatch_model_load(const char * path, int32_t n_gpu_layers, bool weights, mtpbatch_progress progress,
                                    void * user, mtpbatch_model ** model, mtpbatch_error * error);
void            mtpbatch_model_free(mtpbatch_model * model);
// Adds a LoRA adapter, times `scale`, to all contexts of the model, which must have none yet: heads that
// draft are adapted like the rest of it. llama.cpp applies adapters to whole contexts, not to single sequences.
mtpbatch_status mtpbatch_model_add_adapter(mtpbatch_model * model, const char * path, float scale,
                                           mtpbatch_error * error);
void            mtpbatch_model_get_facts(const mtpbatch_model * model, mtpbatch_model_facts * facts);
// NULL: the model file carries no chat template. The text lives as long as the model.
const char * mtpbatch_model_chat_template(const mtpbatch_model * model);
// These write up to `size` bytes and return how many there are, or -1: no such key.
int32_t mtpbatch_model_describe(const mtpbatch_model * model, char * text, size_t size);
int32_t mtpbatch_model_metadata(const mtpbatch_model * model, const char * key, char * text, size_t size);

bool mtpbatch_model_is_eog(const mtpbatch_model * model, int32_t token);
bool mtpbatch_model_is_control(const mtpbatch_model * model, int32_t token);
// Bytes of one token; control tokens have bytes only if `special`. Returns how many there are, or
// minus that if `size` is too small.
int32_t mtpbatch_model_token_bytes(const mtpbatch_model * model, int32_t token, bool special, char * bytes,
                                   int32_t size);
// Where a text may be cut before it is tokenized, so that the tokens of its pieces are its own: ascending
// offsets, so that no piece has many special tokens. `n` returns how many there are, n_text / 64 at most.
mtpbatch_status mtpbatch_model_cuts(const mtpbatch_model * model, const char * text, int32_t n_text, bool parse_special,
                                    int32_t * cuts, int32_t * n, mtpbatch_error * error);
// `n` returns how many tokens (bytes) there are; if that is more than `size`, nothing was written.
mtpbatch_status mtpbatch_model_tokenize(const mtpbatch_model * model, const char * text, int32_t n_text,
                                        bool add_special, bool parse_special, int32_t * tokens, int32_t size,
                                        int32_t * n, mtpbatch_error * error);
mtpbatch_status mtpbatch_model_detokenize(const mtpbatch_model * model, const int32_t * tokens, int32_t n_tokens,
                                          bool special, char * text, int32_t size, int32_t * n, mtpbatch_error * error);

// --- context -------------------------------------------------------------------------------------

typedef struct mtpbatch_context mtpbatch_context;

typedef struct mtpbatch_context_params {
    int32_t n_ctx;          // tokens per sequence
    int32_t n_seq;          // 1 to 256
    int32_t n_batch;        // most tokens in one decode
    int32_t n_ubatch;       // most tokens in one forward pass
    int32_t n_rs_seq;       // recurrent states kept per sequence, so that this many tokens can be taken back
    int32_t n_outputs_max;  // most rows with logits in one decode
    int32_t n_threads;
    int32_t kv_type;  // a ggml_type
    bool    kv_unified;
    // Tokens that all sequences together can hold, a fork's counted again; n_ctx to n_ctx * n_seq, and
    // less than that only if kv_unified. 0: n_ctx * n_seq.
    int32_t n_cells;
    // Every row gives its embedding: all are outputs (n_outputs_max is not read), and n_rs_seq is 0. No
    // heads draft for such a context, and no executor drives it.
    bool embeddings;
} mtpbatch_context_params;

// Rows of one decode. Rows of one sequence stand together and continue its positions.
typedef struct mtpbatch_batch {
    int32_t         n_tokens;
    const int32_t * tokens;
    const int32_t * positions;
    const int32_t * seq_ids;
    const bool *    outputs;  // rows whose logits are wanted
} mtpbatch_batch;

// `target` NULL makes a default context; otherwise an MTP context that drafts for `target`, with
// the target's own n_ctx, n_seq, n_batch, n_ubatch, n_threads, kv_type, kv_unified and n_cells
// (`params` is not read and may be NULL). `model` is then the target's own, or an assistant made for it.
mtpbatch_status mtpbatch_context_create(const mtpbatch_model * model, const mtpbatch_context_params * params,
                                        const mtpbatch_context * target, mtpbatch_context ** context,
                                        mtpbatch_error * error);
void            mtpbatch_context_free(mtpbatch_context * context);
// What the context really has: n_rs_seq, n_batch and n_ubatch can be less than was asked.
void mtpbatch_context_get_params(const mtpbatch_context * context, mtpbatch_context_params * params);
bool mtpbatch_context_is_mtp(const mtpbatch_context * context);
// The bytes it takes on a device.
typedef struct mtpbatch_memory {
    uint64_t weights;  // the model's, once for all of its contexts
    uint64_t states;   // KV cells and recurrent states
    uint64_t compute;  // what layers compute
    // At most, on the CPU: they come with decodes that need so much.
    uint64_t logits;
    uint64_t hidden_rows;  // if a session drafts; of an MTP context, also those that wait there for the heads
} mtpbatch_memory;
void            mtpbatch_context_get_memory(const mtpbatch_context * context, int32_t device, mtpbatch_memory * memory);
mtpbatch_status mtpbatch_context_decode(mtpbatch_context * context, const mtpbatch_batch * batch,
                                        mtpbatch_error * error);
// Logits of a row of the last batch that asked for them: n_vocab floats, valid until the next
// decode. NULL: no such row, or an executor drives the context.
const float * mtpbatch_context_logits(mtpbatch_context * context, int32_t row);
// Embeddings of the rows of the last batch, in its order: the model's last hidden rows, n_embd floats
// each, valid until the next decode. NULL: it was not made for them, or has decoded nothing.
const float * mtpbatch_context_embeddings(mtpbatch_context * context);
// The number of positions a sequence has decoded; -1: no such sequence.
int32_t mtpbatch_context_length(const mtpbatch_context * context, int32_t seq_id);
// Takes back a sequence's positions from `length` on (0: all of it). With recurrent layers only the
// last decode can be taken back, once, by at most n_rs_seq tokens and not as a whole; and only if it
// was one forward pass: of a single sequence, or with equally many rows of each sequence, at most
// n_ubatch in all, and consecutive sequence ids unless kv_unified.
mtpbatch_status mtpbatch_context_truncate(mtpbatch_context * context, int32_t seq_id, int32_t length,
                                          mtpbatch_error * error);

// --- MTP session ---------------------------------------------------------------------------------

typedef struct mtpbatch_session mtpbatch_session;

#define MTPBATCH_MAX_DRAFT 32

typedef struct mtpbatch_session_config {
    int32_t n_seq;
    int32_t n_draft_max;  // 1 to MTPBATCH_MAX_DRAFT
    int32_t n_min;        // shorter drafts are dropped
    float   p_min;        // a draft ends before a token the head gives less probability
} mtpbatch_session_config;

typedef struct mtpbatch_session_statistics {
    int64_t n_drafts;   // non-empty ones
    int64_t n_drafted;  // tokens
    int64_t n_accepted;
    int64_t n_decodes;  // of the draft context
    int64_t n_rows;     // decoded there
    int64_t draft_us, process_us, accept_us;
    int64_t drafted_by_depth[MTPBATCH_MAX_DRAFT];
    int64_t accepted_by_depth[MTPBATCH_MAX_DRAFT];
} mtpbatch_session_statistics;

mtpbatch_status mtpbatch_session_create(const mtpbatch_context * target, const mtpbatch_context * draft,
                                        const mtpbatch_session_config * config, mtpbatch_session ** session,
                                        mtpbatch_error * error);
void            mtpbatch_session_free(mtpbatch_session * session);
mtpbatch_status mtpbatch_session_begin(mtpbatch_session * session, int32_t seq_id, int32_t n_prompt,
                                       mtpbatch_error * error);
mtpbatch_status mtpbatch_session_process(mtpbatch_session * session, const mtpbatch_batch * batch,
                                         mtpbatch_error * error);
// Drafts for n sequences at once, one decode per depth. `depths` gives each its own limit, 0 to
// n_draft_max; the end of the context is another. Draft i is written to drafts[i*n_draft_max], its length to
// lengths[i].
mtpbatch_status mtpbatch_session_draft(mtpbatch_session * session, int32_t n, const int32_t * seq_ids,
                                       const int32_t * n_past, const int32_t * last_tokens, const int32_t * depths,
                                       int32_t * drafts, int32_t * lengths, mtpbatch_error * error);
mtpbatch_status mtpbatch_session_accept(mtpbatch_session * session, int32_t seq_id, int32_t n_accepted,
                                        mtpbatch_error * error);
// All that both contexts and the session hold of a sequence, what waits for the MTP heads included:
// nothing is decoded, neither here nor by restore and fork. `n` returns how many bytes that takes;
// if that is more than `size`, nothing was written. No draft may be under way.
mtpbatch_status mtpbatch_session_save(mtpbatch_session * session, int32_t seq_id, uint8_t * state, size_t size,
                                      size_t * n, mtpbatch_error * error);
// Replaces a sequence by a saved one, of any session of the same model (its metadata, and some bytes
// of each tensor) and settings (n_ctx may differ, and n_seq if kv_unified). With recurrent layers or a sliding window
// the target cannot be truncated into it. A state that is refused changes nothing; one that llama.cpp cannot take
// leaves the sequence empty.
mtpbatch_status mtpbatch_session_restore(mtpbatch_session * session, int32_t seq_id, const uint8_t * state, size_t size,
                                         mtpbatch_error * error);
// Replaces a sequence by a copy of another. No draft of `source` may be under way.
mtpbatch_status mtpbatch_session_fork(mtpbatch_session * session, int32_t source, int32_t target,
                                      mtpbatch_error * error);
void mtpbatch_session_get_statistics(const mtpbatch_session * session, mtpbatch_session_statistics * statistics);

// --- executor ------------------------------------------------------------------------------------
//
// Runs plans on a thread of its own, so that the next step begins when the last one ends, whatever
// the caller is busy with. It keeps each sequence's position, last token and sampler: a plan says
// what is new, and one that may be repeated stands until the next plan comes.

typedef struct mtpbatch_executor mtpbatch_executor;

typedef struct mtpbatch_text {
    int32_t      n_bytes;
    const char * bytes;
} mtpbatch_text;

#define MTPBATCH_MAX_LOGPROBS 20

// How probable the model finds a token after a row, before anything that sampling does to it, as
// natural logarithms. A logit that is not a number counts as -inf, and so does the logarithm of what
// is impossible.
typedef struct mtpbatch_token_logprobs {
    int32_t token;
    float   logprob;
    int32_t rank;   // 1: no token is more probable
    int32_t n_top;  // the most probable tokens follow, in descending order; of equal ones the lower first
    int32_t top[MTPBATCH_MAX_LOGPROBS];
    float   top_logprobs[MTPBATCH_MAX_LOGPROBS];
} mtpbatch_token_logprobs;

typedef struct mtpbatch_tokens {
    int32_t         n;
    const int32_t * ids;
} mtpbatch_tokens;

typedef struct mtpbatch_bias {
    int32_t token;
    float   bias;
} mtpbatch_bias;

// DRY: what would make the text repeat itself becomes the less likely the longer the repetition is.
typedef struct mtpbatch_dry mtpbatch_dry;

// How a request picks tokens. What it changes in a row's logits comes first, in the order given here; then
// tokens are left out, from top_k on; then one of those that remain is drawn.
typedef struct mtpbatch_sampling {
    int32_t               n_bias;
    const mtpbatch_bias * bias;  // added
    // Of each, the last token is impossible where the answer ends with the others.
    int32_t                 n_banned;
    const mtpbatch_tokens * banned;
    // These are impossible until so many tokens have been picked.
    int32_t              min_tokens;
    mtpbatch_tokens      withheld;
    float                repetition_penalty;  // 1: none; of tokens in the history or the answer
    float                frequency_penalty;   // 0: none; for each time that the answer holds the token
    float                presence_penalty;    // 0: none; of tokens in the answer
    const mtpbatch_dry * dry;                 // NULL: none
    mtpbatch_tokens      history;          // what comes before the answer; only repetition_penalty and dry look at it
    int32_t              top_k;            // 0: all
    float                typical_p;        // 1: all
    float                top_p;            // 1: all
    float                min_p;            // 0: all
    float                xtc_probability;  // 0: never
    float                xtc_threshold;
    float                temperature;  // 0: greedy, whatever would be left out
    uint32_t             seed;
} mtpbatch_sampling;

// What answers keep to, by llguidance: compilers, each for one model, and what they compile.
typedef struct mtpbatch_grammar_compiler mtpbatch_grammar_compiler;
typedef struct mtpbatch_grammar          mtpbatch_grammar;

// `library` is the path of the compiled module of llguidance's Python package. Takes about a second where
// the vocabulary is large. MTPBATCH_INVALID_ARGUMENT: the model has no end-of-generation token.
mtpbatch_status mtpbatch_grammar_compiler_create(const mtpbatch_model * model, const char * library,
                                                 mtpbatch_grammar_compiler ** compiler, mtpbatch_error * error);
void            mtpbatch_grammar_compiler_free(mtpbatch_grammar_compiler * compiler);
// `text` is a grammar in llguidance's own JSON. Several threads may call it at once. It can take very long
// and overflow the stack: try grammars of strangers in another process.
mtpbatch_status mtpbatch_grammar_create(const mtpbatch_grammar_compiler * compiler, const char * text,
                                        mtpbatch_grammar ** grammar, mtpbatch_error * error);
void            mtpbatch_grammar_free(mtpbatch_grammar * grammar);

// A sequence id taken by a new request.
typedef struct mtpbatch_admission {
    int32_t           seq_id;
    mtpbatch_sampling sampling;
    int32_t           max_tokens;
    int32_t           n_stop;
    const int32_t *   stop_tokens;
    // Texts, in UTF-8 and not empty, with which the caller may end it: it takes part in no step after
    // the one that completes one of them, unless the token is one of the first `sampling.min_tokens`.
    int32_t               n_stop_texts;
    const mtpbatch_text * stop_texts;
    bool                  drafts;  // false: it never will, so that nothing is kept for the MTP head
    int64_t               ticket;  // names the request for mtpbatch_executor_cancel, and when it is parked
    // A snapshot that it starts from, and how many of its first tokens are kept: all of them, unless
    // the model has neither recurrent layers nor a sliding window. 0: it starts empty. What never
    // drafted can start only what never does.
    int64_t snapshot;
    int32_t n_reused;
    // How many of the most probable tokens are reported beside each that it generates, and beside each
    // that an entry of it has scored: 0 to MTPBATCH_MAX_LOGPROBS; -1: nothing is reported.
    int32_t n_logprobs;
    int32_t n_prompt_logprobs;
    // Only tokens that it allows are sampled, and drafts end before others; a model's end-of-generation
    // tokens are allowed at its end alone. NULL: there is none. It is not needed after the call.
    const mtpbatch_grammar * grammar;
} mtpbatch_admission;

// A sequence's state is copied to host memory, as a snapshot that a number, not 0, names until a plan
// drops it.
typedef struct mtpbatch_save {
    int32_t seq_id;
    int64_t snapshot;
} mtpbatch_save;

// A request gives up its sequence id, and is kept by its ticket; with a snapshot of its state,
// unless that is 0.
typedef struct mtpbatch_park {
    int32_t seq_id;
    int64_t snapshot;
} mtpbatch_park;

// A parked request takes a sequence id again. From the snapshot it was parked with, it goes on as if
// it had never paused; if it has ended, with the state of its end. The plan that parks it may resume
// it, so that it moves to another id. With 0, all of its tokens, prompt and generated ones, come again
// as a prompt.
typedef struct mtpbatch_resume {
    int32_t seq_id;
    int64_t ticket;
    int64_t snapshot;
} mtpbatch_resume;

typedef struct mtpbatch_entry {
    int32_t         seq_id;
    int32_t         n_tokens;  // next tokens of the prompt; 0: go on from the token sampled last
    const int32_t * tokens;
    bool            sample;     // false: more of the prompt is to come
    int32_t         n_draft;    // most tokens to draft in each step that goes on from a sampled token
    bool            selective;  // false: it drafts to n_draft; true: while that pays, on the plan's terms
    float           expected;   // selective: the chance that its next draft is accepted, as far as is known beforehand
    // How probable these are is reported, one after each of its first rows: a prompt's own tokens from
    // the second on, and if more of it is to come the next one. For requests with n_prompt_logprobs.
    int32_t         n_scored;
    const int32_t * scored;
} mtpbatch_entry;

#define MTPBATCH_CONFIDENCES 16

// When a draft pays. Prices are in tokens: those that could be generated in the time it takes. They
// are finite and not negative.
typedef struct mtpbatch_terms {
    float target_row;    // to verify one more token
    float target_pass;   // one more forward pass
    float draft_row;     // to draft one more token
    float draft_decode;  // one more decode of the draft context
    // The chance that a draft is accepted, by how confident the head is, for requests that are greedy
    // and then for those that sample. A head that gives its token the probability p has the
    // confidence 2 * log2(1 / (1 - p)), rounded down and at most the last one.
    float acceptance[2 * MTPBATCH_CONFIDENCES];
} mtpbatch_terms;

typedef struct mtpbatch_plan {
    int64_t                    number;  // comes back with the results
    int32_t                    n_release;
    const int32_t *            release;
    int32_t                    n_admit;
    const mtpbatch_admission * admit;
    int32_t                    n_entries;  // 0: the plan before this one stands
    const mtpbatch_entry *     entries;
    const mtpbatch_terms *     terms;  // NULL: none, and no entry is selective
    // 0: a single step. Otherwise the plan is repeated, without the prompts it fed, until the next
    // one comes, and a step begins while at most this many steps have not been taken in.
    int32_t run_ahead;
    // Whether each step's result is waited for. Otherwise they come together, every 50 ms, but for
    // those of the plan's first step and of steps in which a sequence ends.
    bool followed;
    // Whether the MTP head is to pair the tokens of prompts with their hidden rows. Without these a prompt
    // takes less time, and drafts after it are accepted less often.
    bool keep_prompts;
    // Memory. In this order: save, park, release, drop and forget, admit, resume.
    int32_t                 n_save;
    const mtpbatch_save *   save;
    int32_t                 n_park;
    const mtpbatch_park *   park;
    int32_t                 n_drop;
    const int64_t *         drop;  // snapshots
    int32_t                 n_forget;
    const int64_t *         forget;  // tickets of parked requests
    int32_t                 n_resume;
    const mtpbatch_resume * resume;
} mtpbatch_plan;

typedef enum mtpbatch_finish {
    MTPBATCH_GOES_ON = 0,
    MTPBATCH_STOP_TOKEN,
    MTPBATCH_TOKEN_LIMIT,
} mtpbatch_finish;

typedef struct mtpbatch_saved {
    int64_t snapshot;
    int64_t n_bytes;  // 0: it could not be taken, and there is none
} mtpbatch_saved;

typedef struct mtpbatch_scored {
    int32_t                 entry;   // its index in the plan
    bool                    prompt;  // one of the entry's `scored`; false: one that it generated
    mtpbatch_token_logprobs logprobs;
} mtpbatch_scored;

typedef struct mtpbatch_stuck {
    int32_t      seq_id;
    const char * message;
} mtpbatch_stuck;

typedef struct mtpbatch_step {
    int64_t         plan;     // its number
    mtpbatch_status status;   // not MTPBATCH_OK: its entries' sequences (recurrent layers: all) are lost; release them
    const char *    message;  // the reason
    // Four columns parallel to the plan's entries: how many tokens, of them how many accepted drafts,
    // how many were drafted, and a mtpbatch_finish. Then the tokens, one entry's after the other's:
    // accepted drafts and the sampled one. All 0 if the sequence took no part: it was released, has
    // finished, met a stop text, was cancelled or lost meanwhile, or waits for more of its prompt.
    int32_t         n_entries;  // 0: the step failed, or had none
    int32_t         n_words;
    const int32_t * words;
    int32_t         n_target_tokens;
    int32_t         n_target_decodes;
    int32_t         n_draft_tokens;  // rows decoded by the draft context
    int32_t         n_draft_decodes;
    // Drafts that were verified, if the plan has terms: n_trials times an index of `acceptance`, how
    // many, and of them how many were accepted.
    int32_t         n_trials;
    const int32_t * trials;
    // Of those of its entries that ask for it; each entry's in order, scored ones before generated ones.
    int32_t                 n_scored;
    const mtpbatch_scored * scored;
    int64_t                 gap_us;  // since the step before, if it left sequences to go on
    int64_t                 draft_us, target_us, sample_us;
    // What came of the plan's saves, parks and restores: reported with its first step. A plan that
    // saves or parks and has no entries is reported like a step, in which nothing else happened.
    int32_t                n_saved;
    const mtpbatch_saved * saved;
    int32_t                n_lost;
    const int32_t *        lost;     // ids whose snapshot could not be restored; release them
    int64_t                save_us;  // spent on all of that
    // Requests whose grammar llguidance has given up on, or leaves no token that is not banned: they take
    // no part any more; release them.
    int32_t                n_stuck;
    const mtpbatch_stuck * stuck;
} mtpbatch_step;

// `session` NULL: never drafts. From here on the contexts and the session belong to the executor.
mtpbatch_status mtpbatch_executor_create(const mtpbatch_context * target, const mtpbatch_session * session,
                                         mtpbatch_executor ** executor, mtpbatch_error * error);
// Ends its thread when the step under way has ended, and the wait of an exchange; idempotent. No
// step begins after that, and every further exchange fails with MTPBATCH_CONTEXT_FAILED.
void mtpbatch_executor_stop(mtpbatch_executor * executor);
void mtpbatch_executor_free(mtpbatch_executor * executor);
// Takes in that the steps of the last call were seen, hands over a plan (or NULL), and gives the
// steps that have ended since. It waits at most `wait_us` microseconds (-1: as long as it takes) for one
// that is worth a look (see `followed`), or for mtpbatch_executor_wake. They stay valid until the next
// call.
//
// A plan frees what it releases, takes in what it admits, and then each of its steps drafts,
// decodes, samples and verifies, and takes back what was rejected. It begins when the step under
// way ends; plans that wait are begun in order, each for one step at least. What a waiting plan
// releases leaves at once, and entries of plans before it for that sequence are passed over, unless
// one of those admits it first, or it is to be saved before. A step begins only if all its rows find
// cells; a plan that stands is not repeated otherwise, and the first step of one fails with
// MTPBATCH_NO_KV_SLOT. All entries share one decode, except that on models with recurrent
// layers drafts of each length have one of their own.
//
// MTPBATCH_INVALID_ARGUMENT: the plan breaks a rule and was not taken. Any other status: the thread
// has ended, and nothing can be executed any more.
mtpbatch_status mtpbatch_executor_exchange(mtpbatch_executor * executor, const mtpbatch_plan * plan, int64_t wait_us,
                                           int32_t * n_steps, const mtpbatch_step ** steps, mtpbatch_error * error);
// Any thread: ends the wait of the exchange under way, or of the next one.
void mtpbatch_executor_wake(mtpbatch_executor * executor);
// Any thread: wakes, and the requests of that ticket take part in no step after the one under way.
// That needs no exchange. A plan must still release them. It counts for requests that were handed
// over, and for those that the next exchange hands over: whoever makes plans learns of it after that.
void mtpbatch_executor_cancel(mtpbatch_executor * executor, int64_t ticket);

// --- sampler -------------------------------------------------------------------------------------

typedef struct mtpbatch_sampler mtpbatch_sampler;

// To make one takes time, as it looks for the breakers in the whole vocabulary. Any number of requests
// may share it, from any thread; the model may be gone by then.
//
// A token that would continue a repetition of n tokens, n at least `allowed_length`, loses multiplier *
// base^(n - allowed_length). Repetitions are found among the last `n_last` tokens, and never across a
// breaker: texts of 1 to 40 bytes that end with a zero.
mtpbatch_status mtpbatch_dry_create(const mtpbatch_model * model, float multiplier, float base, int32_t allowed_length,
                                    int32_t n_last, int32_t n_breakers, const char ** breakers, mtpbatch_dry ** dry,
                                    mtpbatch_error * error);
void            mtpbatch_dry_free(mtpbatch_dry * dry);

// Picks tokens as the executor does for a request. Rows are looked through by up to `n_threads` threads.
mtpbatch_status mtpbatch_sampler_create(const mtpbatch_sampling * params, int32_t n_threads,
                                        mtpbatch_sampler ** sampler, mtpbatch_error * error);
void            mtpbatch_sampler_free(mtpbatch_sampler * sampler);
// One token for each row of logits[n_rows][n_vocab], each after those picked before it.
mtpbatch_status mtpbatch_sampler_sample(mtpbatch_sampler * sampler, const float * logits, int32_t n_rows,
                                        int32_t n_vocab, int32_t * tokens, mtpbatch_error * error);

// --- log probabilities ---------------------------------------------------------------------------

// How probable tokens[i] is after row i of logits[n_rows][n_vocab], with the n_top most probable ones, 0
// to MTPBATCH_MAX_LOGPROBS.
mtpbatch_status mtpbatch_score(const float * logits, int32_t n_rows, int32_t n_vocab, const int32_t * tokens,
                               int32_t n_top, mtpbatch_token_logprobs * logprobs, mtpbatch_error * error);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
