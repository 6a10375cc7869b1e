"""What GXPO costs, as ratios within one run: python -m gxpo_reference.benchmarks --help."""
