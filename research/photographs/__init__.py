"""The study on photographs: a public ImageNet model cut, trained back a little, and its maps on real objects.

Its plan is ``results/photographs/PLAN.md``. The photographs stay where ``SVIT_DATA_DIR`` says; only numbers are kept.
"""
