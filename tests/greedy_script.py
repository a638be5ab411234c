"""The end of programs that ask llama.cpp alone, in a process of their own."""

GREEDY = """
texts = []
for fed in prompts:
    llama.reset()
    tokens = []
    while len(tokens) < count:
        llama.eval(fed)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        logits = np.ctypeslib.as_array(logits, (llama.n_vocab(),))
        second, first = np.partition(logits, -2)[-2:]
        if first - second < tie:
            break
        tokens.append(int(logits.argmax()))
        fed = tokens[-1:]
    texts.append(tokens)
json.dump(texts, sys.stdout)
"""
"""Prints the best tokens after each prompt: ``count`` of them, or up to the first near-tie."""
