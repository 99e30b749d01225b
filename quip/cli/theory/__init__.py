"""Commands that measure what the papers prove: theory, counterexample, equivalence."""
