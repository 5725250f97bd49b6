"""What /metrics shows, for Prometheus: of requests, of the engine, and of several engines together."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from inference.prefix_cache import PrefixCache
from inference.serving import Engine

NAMESPACE = "onetune"
OF_REQUESTS = ("requests", "request_seconds")  # what a front counts itself: its clients are not those of an engine


class Metrics:
    """Requests, as `http_gate.Gate` counts them."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        new = {"namespace": NAMESPACE, "registry": self.registry}
        requests, seconds = OF_REQUESTS
        self.requests = prometheus_client.Counter(requests, "Requests.", ["path", "status"], **new)
        self.seconds = prometheus_client.Histogram(seconds, "From request to answer.", ["path"], **new)

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return prometheus_client.generate_latest(self.registry)


class EngineMetrics(Metrics):
    """And what an engine does."""

    def __init__(self, engine: Engine):
        super().__init__()
        new = {"namespace": NAMESPACE, "registry": self.registry}
        self.tokens_in = prometheus_client.Counter("prompt_tokens", "Tokens of prompts.", **new)
        self.tokens_out = prometheus_client.Counter("generated_tokens", "Tokens generated.", **new)
        queue = prometheus_client.Gauge("queue_length", "Answers that wait.", **new)
        queue.set_function(lambda: len(engine.waiting))
        batch = prometheus_client.Gauge("batch_size", "Answers that are being generated.", **new)
        batch.set_function(lambda: engine.running)
        if engine.prefixes is not None:
            self.registry.register(PrefixMetrics(engine.prefixes))


class PrefixMetrics:
    """How often prompts began with what was held: hits / prompts, and in tokens reused_tokens / tokens."""

    def __init__(self, prefixes: PrefixCache):
        self.prefixes = prefixes

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        held, name = self.prefixes, f"{NAMESPACE}_prefix_cache"
        yield CounterMetricFamily(f"{name}_prompts", "Prompts that were looked up in the cache.", held.prompts)
        yield CounterMetricFamily(f"{name}_hits", "Prompts whose beginning was in it.", held.hits)
        yield CounterMetricFamily(f"{name}_tokens", "Tokens of the prompts that were looked up.", held.tokens)
        yield CounterMetricFamily(f"{name}_reused_tokens", "Those that were in it, and not read again.", held.reused)
        yield GaugeMetricFamily(f"{name}_bytes", "Keys and values in it.", held.size)


class FrontMetrics(Metrics):
    """Requests to a front, and the sums of what its engines do; with the label `engine` what each does.

    A counter's sum has in it what engines that have ended had counted when they were asked the last time.
    """

    def __init__(self, count: int):
        super().__init__()
        new = {"namespace": NAMESPACE, "registry": self.registry}
        up = prometheus_client.Gauge("engine_up", "Whether an engine takes requests.", ["engine"], **new)
        starts = prometheus_client.Counter("engine_starts", "How often it was started.", ["engine"], **new)
        answers = prometheus_client.Gauge("engine_answers", "Answers that it was asked for.", ["engine"], **new)
        self.up, self.starts, self.answers = ([one.labels(i) for i in range(count)] for one in (up, starts, answers))
        self.last: list[dict[str, Metric]] = [{} for _ in range(count)]  # by name, what each engine has said
        self.ended: dict[str, float] = {}  # by name, the counters of engines that have ended
        self.known: dict[str, Metric] = {}  # by name, what any engine has ever said
        self.registry.register(self)

    def take(self, engine: int, text: str) -> None:
        """Keep what an engine's own /metrics says."""
        own = {f"{NAMESPACE}_{name}" for name in OF_REQUESTS}
        families = [one for one in text_string_to_metric_families(text) if one.name not in own]
        self.last[engine] = {one.name: one for one in families if not one.name.endswith("_created")}
        self.known |= self.last[engine]

    def end(self, engine: int) -> None:
        """Note that an engine has ended: it counts from 0 when it is there again."""
        for name, family in self.last[engine].items():
            if family.type == "counter":
                self.ended[name] = self.ended.get(name, 0) + value_of(family)
        self.last[engine] = {}

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        for name, family in self.known.items():
            make = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
            each = {engine: value_of(said[name]) for engine, said in enumerate(self.last) if name in said}
            yield make(name, family.documentation, sum(each.values()) + self.ended.get(name, 0))
            labelled = make(name.replace(NAMESPACE, f"{NAMESPACE}_engine", 1), family.documentation, labels=["engine"])
            for engine, value in each.items():
                labelled.add_metric([str(engine)], value)
            yield labelled


def value_of(family: Metric) -> float:
    """The number of a metric without labels."""
    (value,) = (sample.value for sample in family.samples if not sample.name.endswith("_created"))
    return value
