"""Other defenses in plain PyTorch, from their papers' formulas, with their published defaults.

Each takes a model and clean images and returns another model:
``defend(model, images, labels, seed)``. Those that prune also say in which order, so that
`benchmarks.peers.rule` can choose their cut as `mnp_fast.defend` does.
"""
