"""What all tests share: hypothesis judges results, not the speed of the machine."""

from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.load_profile("default")
