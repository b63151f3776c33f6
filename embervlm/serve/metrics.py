"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()  # a second line for each
        self.registry = own = CollectorRegistry()

        def count(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"embervlm_{name}_total", about, labels, registry=own)

        self.requests = count("requests", "Answered requests by path and HTTP status", "path", "status")
        self.left = count("requests_given_up", "Requests whose client left, or whose time was over, before the answer")
        self.prompt_tokens = count("prompt_tokens", "Tokens of pictures and questions")
        self.tokens = count("generated_tokens", "Tokens of chains and answers")
        self.rows = Gauge("embervlm_rows", "Chains that are being written", registry=own)
        self.waiting = Gauge("embervlm_waiting_rows", "Chains that wait for their turn", registry=own)
        about = "From the end of the request to its first token"
        self.first_token_s = Histogram("embervlm_first_token_seconds", about, buckets=FIRST_TOKEN_S, registry=own)
        about = "From the end of the request to the end of its answer"
        self.whole_s = Histogram("embervlm_request_seconds", about, buckets=WHOLE_S, registry=own)

    def text(self) -> bytes:
        return generate_latest(self.registry)
