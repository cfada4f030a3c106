"""The figures of docs/methods: what each method does to the shipped models, measured by the methods' own code.

python -m infer.figures --model demo-wan --image-model demo-flux --out docs/methods [--only hsa,coredit]
"""
