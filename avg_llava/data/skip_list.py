"""Skip lists: records that `avg-llava verify-data` found unusable, which a data set leaves out.

A skip list is a JSON file that identifies data files by the SHA-256 of their bytes, so that it is never applied to
other records than those it was made from:

    {"format": 1, "files": {"<sha256>": {"path": "data.json", "skip": {"17": "missing: images/17.png: ..."}}}}

Records are identified by their position: the index in a list, or the line of a `.jsonl` file, counted from 1.
"""

import json
from pathlib import Path
from typing import NamedTuple

from avg_llava.common.files import write_json
from avg_llava.data.records import DataError

FORMAT = 1


class SkippedRecords(NamedTuple):
    """The skipped records of one file: position -> reason."""

    path: str
    skip: dict[int, str]


class SkipList(NamedTuple):
    """Records to leave out, by the SHA-256 of their file. Messages call the list `name`."""

    files: dict[str, SkippedRecords]
    name: str = "the skip list"

    def positions(self, path: str | Path, sha256: str) -> frozenset[int]:
        """Positions of the skipped records of a file.

        Raises:
            DataError: The file was not verified, or has changed since.
        """
        if sha256 not in self.files:
            raise DataError(
                f"{self.name} does not know {path}: it was made of other files, or the file has changed since; run "
                "`avg-llava verify-data` again"
            )
        return frozenset(self.files[sha256].skip)

    def write(self, path: Path) -> None:
        """Writes the list atomically."""
        files = {
            sha256: {"path": records.path, "skip": dict(sorted(records.skip.items()))}
            for sha256, records in self.files.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "files": files}, ensure_ascii=False)


def read_skip_list(path: str | Path) -> SkipList:
    """Reads a skip list.

    Raises:
        DataError: The file is missing or not a skip list.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{path} is a skip list of format {content['format']}; this program reads {FORMAT}")
        files = {
            sha256: SkippedRecords(records["path"], {int(key): reason for key, reason in records["skip"].items()})
            for sha256, records in content["files"].items()
        }
    except OSError as error:
        raise DataError(f"cannot read the skip list {path}: {error.strerror}; check data.skip_list") from error
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no skip list of `avg-llava verify-data` ({error!r})") from error
    return SkipList(files, str(path))
