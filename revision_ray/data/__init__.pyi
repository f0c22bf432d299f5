"""Read records and images of every format, and keep embedding stores."""

from .chat import ChatTemplate
from .conversations import Conversation, ConversationSource, read_conversations
from .imports import ImportJob, run_import
from .shards import EmbeddingTable, Manifest, read_embeddings, read_manifest, write_shard
from .store import RowGroup, Store, open_stores, read_group

__all__ = [
    "ChatTemplate",
    "Conversation",
    "ConversationSource",
    "EmbeddingTable",
    "ImportJob",
    "Manifest",
    "RowGroup",
    "Store",
    "open_stores",
    "read_conversations",
    "read_embeddings",
    "read_group",
    "read_manifest",
    "run_import",
    "write_shard",
]
