"""pytest plugin: ``pytest --policy my_module:Mine`` tries the laws on a policy, a test item a law.

No test files are needed; with ``--policy`` and no paths none are collected. What a policy may be called is said in
`pagedlab.testing.subject.find_policy`. The entry point has the name of this module, so that pytest knows the plugin
when it meets it again as ``-p pagedlab.testing.plugin``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pagedlab.errors import ConfigError, LawBroken

if TYPE_CHECKING:
    from pagedlab.testing.law import Check
    from pagedlab.testing.subject import Subject


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--policy``."""
    parser.getgroup("pagedlab").addoption(
        "--policy",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="try the laws of its slot on this policy: module:Class, file.py:Class or slot:name; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect no files unless some are named."""
    if config.getoption("--policy") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add an item for every law of every policy."""
    for name in config.getoption("--policy"):
        try:
            node = PolicyNode.from_parent(session, name=name, nodeid=name)
        except ConfigError as error:
            raise pytest.UsageError(f"--policy {name}: {error}") from None
        items += node.collect()


class PolicyNode(pytest.Collector):
    """One policy."""

    def __init__(self, **kwargs: Any) -> None:
        from pagedlab.testing.subject import Subject, find_policy

        super().__init__(**kwargs)
        self.subject: Subject = Subject(find_policy(self.name))

    def collect(self) -> list[pytest.Item]:
        """Return an item for each law."""
        from pagedlab.testing.law import checks_for

        return [
            LawItem.from_parent(self, name=check.name, check=check) for check in checks_for(self.subject.slot)
        ]


class LawItem(pytest.Item):
    """One law, tried on one policy."""

    def __init__(self, *, check: Check, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check = check

    def runtest(self) -> None:
        """Try it."""
        assert isinstance(self.parent, PolicyNode)
        self.check.run(self.parent.subject)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the story of a broken law, without a traceback."""
        if isinstance(excinfo.value, LawBroken):
            return f"{excinfo.value}\nThe law: {self.check.summary}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return where it is: in no file."""
        return self.path, None, self.nodeid
