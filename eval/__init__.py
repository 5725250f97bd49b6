"""Measurements of a model, and servers for those who measure it. Each script runs by itself.

exact_match.py      exact match on a file of questions. Start here
lm_eval_harness.py  lm-eval's tasks
quality.py          what quantising and merging cost an adapter, side by side (quality_texts.py, quality_variants.py,
                    quality_report.py; divergence.py: KL and agreement; sensitivity.py: which layers suffer)
helm_server.py      the server for HELM and for OpenAI's clients (challenge_api.py, openai_api.py; http_gate.py: token,
                    limits and metrics)
Dockerfile, submission.sh    the submission to the LLM Efficiency Challenge
run_helm.sh, helm.conf       HELM run against the server

Above everything but finetune.py and convert_hf_checkpoint.py.
"""
