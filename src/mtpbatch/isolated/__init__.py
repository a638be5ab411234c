"""The native part in a process of its own, so that the app outlives it.

::

    the app                                        python -m mtpbatch.isolated
    ───────                                        ───────────────────────────
    engine's thread ─ ProcessBackend.exchange ──── steps ──────▶ main thread ─ NativeBackend
    any thread ────── wake, cancel ─────────────── notes ──────▶ a thread
    helper threads ── tokenize, prepare, … ─────── texts ──────▶ a thread each
                   ── compile_grammar ──────────── grammars ───▶ a thread
    embeddings' thread ─────────────────────────── embeddings ─▶ a thread

Each arrow is a socket pair. On all but ``notes`` a message is asked and one answered
(``messages``, ``channel``); so neither side needs to tell answers apart, and who asks for something
long keeps nobody else waiting. Steps run ahead in the process, without the app.

``process`` starts it and notices its end, ``backend`` is what the engine sees. Nothing but
:mod:`msgspec` values of known types crosses, so that a process that a hostile model file has taken
over can lie, but not run code in the app.
"""

from mtpbatch.isolated.backend import ProcessBackend

__all__ = ["ProcessBackend"]
