"""Answers that keep to a form: JSON of a schema, a regular expression, a choice or a grammar.

What a request asks for becomes a :class:`~mtpbatch.types.GrammarSource` (``source``). Strangers may
have written it, and llguidance, which compiles it, can be made to take minutes, gigabytes or all of
the stack. So it is tried first in a process of its own, under limits (``trial``,
``trial_process``).
"""
