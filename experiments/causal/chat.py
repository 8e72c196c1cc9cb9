"""What a run keeps of the chats of a model that it is begun from: the template, and what ends a turn."""

from pathlib import Path

from experiments.causal.text_ends import published_ends
from experiments.data.chat_template import chat_templates, save_chat_templates
from experiments.data.export_tokenizer import GENERATION_FILE
from experiments.data.tokenizers import Tokenizer
from experiments.loop.json_files import write_json


def keep_chat(source: str | Path, folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Writes the chat template of a model into a run's folder, and the ids that end its texts; nothing without one.

    Args:
      source: what the run has its tokenizer of, as `load_tokenizer` takes it; only a folder has templates.
      folder: the run's.
      tokenizer: of both.
      vocab_size: ids that the run's model knows.

    Raises:
      ValueError: as `chat_templates` and `published_ends`.
    """
    if not Path(source).is_dir() or not (templates := chat_templates(Path(source))):
        return
    save_chat_templates(templates, folder)
    write_json(
        {"eos_token_id": list(published_ends(Path(source), tokenizer, vocab_size).closing)}, folder / GENERATION_FILE
    )
