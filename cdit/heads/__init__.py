"""Recording attention maps, per-head measures and their figures."""

from cdit.heads.probe import AttentionConfig, inspect_attention
from cdit.heads.recording import record_attention, unwrap
from cdit.heads.report import AttentionReport

__all__ = ["AttentionConfig", "AttentionReport", "inspect_attention", "record_attention", "unwrap"]
