"""The description of a small table of one's own."""

OWN = """
title: Two methods
source: A test
models: [facebook/opt-125m]
evaluate: [wikitext2]
rows:
  original: {wbits: 16, paper: {method: FP16, processing: none, wbits: 16}}
  Near: {quant: nearest, paper: {method: Near, processing: baseline}}
  QuIP: {quant: ldlq, incoh_processing: true, paper: {method: QuIP(LDLQ), processing: IncP}}
  gain: {difference: [Near, QuIP]}
  share: {ratio: [Near, QuIP]}
columns:
  4 bits: {wbits: 4, paper: {wbits: 4}}
  2 bits: {wbits: 2, paper: {wbits: 2}}
"""
