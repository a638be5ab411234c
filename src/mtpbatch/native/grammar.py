"""Grammars that answers keep to, compiled for a model's vocabulary."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import partial
from typing import Final

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.native._library import Handle, call, ffi, lib
from mtpbatch.native.model import Model
from mtpbatch.structured.library import require_llguidance
from mtpbatch.structured.trial import Trial
from mtpbatch.types import GrammarSource

_KEPT: Final = 32


class Grammar(Handle):
    """A compiled grammar, for :attr:`Admission.grammar`: any number of answers may keep to it."""


class GrammarCompiler:
    """Compiles grammars for one model, and keeps those used last.

    Any thread may call; calls wait for each other. To read the vocabulary, when the first grammar
    comes, takes about a second if it is large. None of it needs the GIL.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._trial = Trial()
        self._compiler: Handle | None = None
        self._grammars: OrderedDict[GrammarSource, Grammar] = OrderedDict()

    def compile(self, source: GrammarSource) -> Grammar:
        """The compiled grammar.

        Raises :class:`InvalidParameterError`: it cannot be done, or takes too much; the model has
        no end-of-generation token; or llguidance is not installed.
        """
        with self._lock:
            grammar = self._grammars.get(source)
            if grammar is None:
                grammar = self._grammars[source] = self._compile(source)
            self._grammars.move_to_end(source)
            if len(self._grammars) > _KEPT:
                self._grammars.popitem(last=False)
            return grammar

    def close(self) -> None:
        """Forget all grammars. Answers under way do not need them."""
        with self._lock:
            self._trial.close()
            self._grammars.clear()
            self._compiler = None

    def _compile(self, source: GrammarSource) -> Grammar:
        invalid = partial(InvalidParameterError, source.parameter)
        if self._compiler is None:
            self._compiler = self._read_vocabulary(source)
        out = ffi.new("mtpbatch_grammar **")
        text = self._trial.compile(source).encode()
        call(lib.mtpbatch_grammar_create, self._compiler._native, text, out, invalid=invalid)
        return Grammar(out[0], lib.mtpbatch_grammar_free)

    def _read_vocabulary(self, source: GrammarSource) -> Handle:
        [library] = require_llguidance(source.parameter).glob("_lib.*so")
        out = ffi.new("mtpbatch_grammar_compiler **")
        call(
            lib.mtpbatch_grammar_compiler_create,
            self._model._native,
            os.fsencode(library),
            out,
            invalid=partial(InvalidParameterError, source.parameter),
        )
        return Handle(out[0], lib.mtpbatch_grammar_compiler_free)
