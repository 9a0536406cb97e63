from __future__ import annotations

from collections.abc import Iterator

import pytest
from programs import Programs, programs_in


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Starts real `rankopt` processes."""
    with programs_in(tmp_path_factory.mktemp("programs")) as found:
        yield found
