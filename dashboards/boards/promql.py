"""PromQL of the panels, put together from names of the catalogue (without `appliance_`).

Series carry Prometheus' own `job` and `instance`; the model is a label of appliance_build_info, so the variable `instance` is narrowed by `model`,
and every query by `instance`.
"""

from __future__ import annotations

Query = tuple[str, str]  # (PromQL, legend)


def series(name: str, **labels: str) -> str:
    """`name` of the chosen instances; a label value that starts with ~ is a regular expression."""
    matchers = [
        'instance=~"$instance"',
        *(f'{label}=~"{value[1:]}"' if value.startswith("~") else f'{label}="{value}"' for label, value in labels.items()),
    ]
    return f"appliance_{name}{{{', '.join(matchers)}}}"


def recorded(name: str, matchers: str = "") -> str:
    """A series of dashboards/alerts.yml's recording rules, of the chosen instances."""
    return f'appliance:{name}{{instance=~"$instance"{", " + matchers if matchers else ""}}}'


def rate(name: str, by: str = "", **labels: str) -> str:
    """Per-second rate of a counter, summed over the chosen instances (and kept apart `by` a label)."""
    return f"{_sum(by)} (rate({series(name, **labels)}[$__rate_interval]))"


def increase(name: str, by: str = "", window: str = "$__rate_interval", **labels: str) -> str:
    """What a counter grew by in `window`, summed likewise."""
    return f"{_sum(by)} (increase({series(name, **labels)}[{window}]))"


def total(name: str, by: str = "", **labels: str) -> str:
    """A gauge summed over the chosen instances."""
    return f"{_sum(by)} ({series(name, **labels)})"


def highest(name: str, by: str = "", **labels: str) -> str:
    """The highest of a gauge."""
    return f"max{f' by ({by})' if by else ''} ({series(name, **labels)})"


def lowest(name: str, by: str = "", **labels: str) -> str:
    """The lowest of a gauge."""
    return f"min{f' by ({by})' if by else ''} ({series(name, **labels)})"


def known(expr: str) -> str:
    """`expr` without NaN: where there was nothing to divide by, such as no request or an idle key, there is no value instead of a broken one."""
    return f"({expr} >= 0)"


def quantile(share: float, name: str, by: str = "") -> str:
    """A quantile of a histogram over all chosen instances."""
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', f'le, {by}' if by else 'le')})"


def quantiles(name: str) -> list[Query]:
    """p50, p95 and p99."""
    return [(quantile(share, name), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def mean(name: str, by: str = "") -> str:
    """The mean of a histogram."""
    return f"{rate(f'{name}_sum', by)} / {rate(f'{name}_count', by)}"


def attainment(objective: str, window: str = "$__rate_interval") -> str:
    """Share of judged requests that were good."""
    good, judged = (increase(name, window=window, objective=objective) for name in ("slo_good_requests_total", "slo_requests_total"))
    return known(f"{good} / {judged}")


def token_goodput(window: str = "$__rate_interval") -> str:
    """Share of the judged requests' tokens that went to good ones."""
    good, judged = (increase(name, window=window, objective="both") for name in ("slo_good_tokens_total", "slo_tokens_total"))
    return known(f"{good} / {judged}")


def availability(window: str) -> str:
    """Share of requests that were not answered with 5xx; no series of 5xx means none."""
    failed, finished = increase("requests_total", window=window, status="~5.."), increase("requests_total", window=window)
    return f"1 - {known(f'({failed} or vector(0)) / {finished}')}"


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
