"""How long hostile input is tried."""

from hypothesis import settings

settings.register_profile("hostile", max_examples=1000)
