"""Measurements of a model, and servers for programs that measure it. Each script runs by itself.

exact_match.py      exact match on a file of questions. Start here
                    exact_match_settings.py  its flags
lm_eval_harness.py  lm-eval's tasks
quality.py          what quantising and merging cost an adapter: every variant of it, side by side
                    quality_variants.py  how a variant is loaded and measured
                    quality_texts.py     the texts that it is measured on
                    quality_report.py    tables and charts of the results
                    divergence.py        KL, agreement and perplexity of one model against another
                    sensitivity.py       which layers suffer most from quantisation, and a plan that fits a budget
between_runs.py     how far the models of two runs are from each other and from their bases, for runs.py
helm_server.py      the server for HELM and for OpenAI's clients (challenge_api.py, openai_api.py)
                    http_gate.py         its token, and the limits of requests
                    http_server.py       how uvicorn runs; streams of events
                    server_metrics.py    what it counts, for Prometheus
                    front.py             several engines behind one port
                    engines.py           their processes
Dockerfile, submission.sh    the submission to the LLM Efficiency Challenge
run_helm.sh, helm.conf       HELM run against the server
                    helm_results.py      the scores of a suite

Imports from every folder and from generate.py but search/. search/ imports exact_match_settings.py, runs.py imports
between_runs.py; nothing else imports from eval/.
"""
