"""Zenoh's configuration: TLS both ways, no other way in, and what each certified name may do.

    SPACE/link/ant/bee/ask|chunk|done     only ant may publish it, it goes to bee alone, and only bee may subscribe
    SPACE/offer/ant/bee                   any listed peer may; ant's Ed25519 signature says whether it is hers
    SPACE/alive/ant                       ant's liveliness token, which ends with her last link

Zenoh drops what its access control refuses without telling anyone. Every message begins with an offer: so offers stand
open, and a device that speaks in another's name is not only refused but seen (E658).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from contextlora.federated.fabric.transfers import CHUNK
from contextlora.federated.identity import Identity, Peer

_ENDS = ("listen", "connect")


def configuration(
    me: Identity, own: Peer, others: Mapping[str, Peer], space: str, listen: str | None, lease: float
) -> dict[str, Any]:
    """Zenoh's configuration: peers that call one another by TLS alone, and the access that each name has.

    Of two peers that both listen the one whose name comes later calls. Addresses are not checked against certificates:
    whoever answers a call is who its certificate says, wherever it is, and has that name's rights.
    """
    calls = [p.endpoint for n, p in others.items() if p.endpoint and (own.endpoint is None or n < me.name)]
    public = {"root_ca_certificate": me.authority} | {f"{end}_certificate": me.certificate for end in _ENDS}
    tls: dict[str, Any] = {f"{field}_base64": base64.b64encode(pem).decode() for field, pem in public.items()}
    tls |= {f"{end}_private_key": str(me.tls_key) for end in _ENDS}
    tls |= {"enable_mtls": True, "verify_name_on_connect": False, "close_link_on_expiration": True}
    link = {
        "protocols": ["tls"],
        "tls": tls,
        "tx": {"lease": round(1000 * lease)},
        "rx": {"max_message_size": 2 * CHUNK},  # that zenoh puts together from fragments, before anyone here sees it
    }
    return {
        "mode": "peer",
        "scouting": {"multicast": {"enabled": False}, "gossip": {"enabled": False}},
        "listen": {"endpoints": [f"tls/{listen}"] if listen else []},
        "connect": {
            "endpoints": [f"tls/{c}" for c in calls],
            "retry": {"period_init_ms": 200, "period_max_ms": 1000, "period_increase_factor": 2},
        },
        "transport": {
            "unicast": {"max_sessions": 2 * len(others) + 8},
            "shared_memory": {"enabled": False},  # would go round TLS between peers of one machine
            "link": link,
        },
        "access_control": _access(me.name, list(others), space),
    }


def _access(me: str, others: list[str], space: str) -> dict[str, Any]:
    """Everything is forbidden but what each certified name needs."""
    rules, policies = [], []
    for peer in others:
        grants = [
            ("ingress", ["put"], [f"link/{peer}/{me}/*", f"offer/*/{me}"]),
            ("egress", ["put"], [f"link/{me}/{peer}/*", f"offer/{me}/{peer}"]),
            ("ingress", ["declare_subscriber"], [f"link/*/{peer}/*", f"offer/*/{peer}"]),
            ("egress", ["declare_subscriber"], [f"link/*/{me}/*", f"offer/*/{me}"]),
            ("ingress", ["liveliness_token"], [f"alive/{peer}"]),
            ("egress", ["liveliness_token"], [f"alive/{me}"]),
            ("ingress", ["declare_liveliness_subscriber", "liveliness_query"], ["alive/*"]),
            ("egress", ["declare_liveliness_subscriber", "liveliness_query"], ["alive/*"]),
        ]
        names = [f"{peer} {n}" for n in range(len(grants))]
        for name, (flow, messages, keys) in zip(names, grants, strict=True):
            rule = {"id": name, "permission": "allow", "flows": [flow], "messages": messages}
            rules.append({**rule, "key_exprs": [f"{space}/{key}" for key in keys]})
        policies.append({"rules": names, "subjects": [peer]})
    subjects = [{"id": peer, "cert_common_names": [peer]} for peer in others]
    lists = {"rules": rules, "subjects": subjects, "policies": policies}
    return {"enabled": True, "default_permission": "deny", **lists}
