"""``gpkernels reproduce``: published results, reproduced, with a computed verdict on each claim.

experiments/  one experiment a file: settings, what is measured, claims with their bounds, pictures
experiment.py what an experiment, a claim and a verdict are          store.py   one result file a seed
runner.py     runs what has no result yet                           report.py  one HTML page, and report.json
pictures.py   panels in the trainer's style, as data URIs           cli.py     the command line
"""
