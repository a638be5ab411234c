"""Load tests: ``mtpbatch bench`` (extra ``bench``)."""
