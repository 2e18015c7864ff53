"""The desired state in the words of each autoscaler that polls. Pure functions of a ScaleView.

All of them answer with the number that was last decided, also while the policy holds: to a poller, no news means no change.
"""

from __future__ import annotations

from typing import Any

import msgspec

from appliance.scaling.loop import ScaleView


def state_json(view: ScaleView) -> dict[str, Any]:
    """Everything that is known, for people and for scalers of one's own."""
    return {
        "instance_id": view.instance_id,
        "fleet": view.fleet,
        "mode": view.mode,
        "desired_replicas": view.desired_replicas,
        "current_replicas": view.current_replicas,
        "pinned": view.pinned,
        "sequence": view.sequence,
        "age_seconds": view.age_seconds,
        "hold": None if view.hold is None else {"kind": view.hold.kind, "reason": view.hold.reason},
        "last_decision": None if view.last_decision is None else msgspec.to_builtins(view.last_decision),
        "disabled_endpoints": list(view.disabled_endpoints),
    }


def keda_metrics_api(view: ScaleView) -> dict[str, int]:
    """Answer for KEDA's metrics-api scaler: `valueLocation: desired_replicas`, `targetValue: "1"` with metric type AverageValue, so that the
    value over the target is the number of replicas."""
    return {"desired_replicas": view.desired_replicas}


def ray_serve_scale(view: ScaleView) -> dict[str, int]:
    """Body for Ray Serve's external scaler: POST .../applications/{app}/deployments/{deployment}/scale."""
    return {"target_num_replicas": view.desired_replicas}


def prometheus_gauge(view: ScaleView) -> str:
    """The gauge in Prometheus text format, for KEDA's `format: prometheus` and for HPA by way of an adapter."""
    name = "appliance_scaling_desired_replicas"
    return f"# HELP {name} Replicas that the policy asks for.\n# TYPE {name} gauge\n{name} {view.desired_replicas}\n"
