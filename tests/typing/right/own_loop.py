"""A loop of one's own over the native layer."""

from mtpbatch.native import (
    Batch,
    Context,
    DraftRequest,
    Model,
    MtpSession,
    Sampler,
    token_logprobs,
)


def run(path: str, prompt: str, n_tokens: int) -> str:
    with Model(path) as model, Context(model, n_ctx=512, n_rs_seq=3) as target:
        sampler = Sampler(model, temperature=0.0)
        tokens: list[int] = model.tokenize(prompt)
        batch = Batch()
        rows: range = batch.add_sequence(tokens, 0, 0)
        target.decode(batch)
        logits = target.logits(rows[-1])
        print(token_logprobs(logits, [1], 2)[0].rank, sampler, n_tokens)
        with Context.mtp(target) as draft, MtpSession(target, draft, 1, 3) as session:
            drafts: list[list[int]] = session.draft_many([DraftRequest(0, len(tokens), 5)])
            print(session.statistics().drafted)
        return model.detokenize(tokens + drafts[0])
