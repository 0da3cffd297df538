"""The table of gates: what each gate id of the contracts runs."""

from __future__ import annotations

from tools import gates_streaming, gates_text, gates_traffic
from tools.trial import Check

GATES: dict[str, Check] = {
    "V1_001": gates_streaming.token_by_token,
    "V1_002": gates_streaming.whole_response,
    "V1_003": gates_streaming.speed,
    "SERVING_001": gates_text.exact_text,
    "SERVING_002": gates_text.exact_finish,
    "SERVING_003": gates_traffic.disconnect_in_queue,
    "SERVING_004": gates_traffic.disconnect_in_prefill,
    "SERVING_005": gates_traffic.disconnect_midway,
    "SERVING_006": gates_traffic.random_disconnects,
    "SERVING_007": gates_text.stop_string,
    "SERVING_008": gates_traffic.interleaved,
    "SERVING_009": gates_text.seeds,
    "SERVING_010": gates_text.neighbours,
    "SERVING_011": gates_text.cached_ids,
}
