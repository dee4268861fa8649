"""Recording attention maps, per-head measures and their figures."""

from cdit.inspection.probe import AttentionConfig, inspect_attention
from cdit.inspection.recording import record_attention, unwrap
from cdit.inspection.report import AttentionReport

__all__ = ["AttentionConfig", "AttentionReport", "inspect_attention", "record_attention", "unwrap"]
