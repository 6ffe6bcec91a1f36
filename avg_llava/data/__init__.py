"""From files of LLaVA records to batches: records, templates, data sets, collator and batch samplers."""

from avg_llava.data.collator import Collator
from avg_llava.data.dataset import ConversationDataset, DataSource
from avg_llava.data.encoding import encode_conversation
from avg_llava.data.records import DataError, Sample, Turn, parse_record, read_records
from avg_llava.data.sampler import ModalityBatches, ShuffledBatches
from avg_llava.model.images import load_image
from avg_llava.model.templates import TEMPLATES

__all__ = [
    "TEMPLATES",
    "Collator",
    "ConversationDataset",
    "DataError",
    "DataSource",
    "ModalityBatches",
    "Sample",
    "ShuffledBatches",
    "Turn",
    "encode_conversation",
    "load_image",
    "parse_record",
    "read_records",
]
