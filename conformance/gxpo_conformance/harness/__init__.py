"""A port beside the oracle: what is asked and answered, how near is near enough, what a finding says."""

from __future__ import annotations
