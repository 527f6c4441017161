"""Helpers shared by the tests, imported as `slipstream_tests`."""
