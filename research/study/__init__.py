"""The study of results/study/PLAN.md: train its models, score their maps, compare, and say what came out."""
