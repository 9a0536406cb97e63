"""`TrialRows`: Optuna's storage in a database, with trials read and written in a few statements each.

Optuna makes an object of every attribute and parameter that it reads, and opens a transaction for every attribute that
it writes: a study of 10,000 trials took ten seconds to open, and the end of a trial a dozen transactions. Tables and
values are Optuna's own, so that its other programs read and write the same studies.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Select, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

_Attribute = type[models.TrialUserAttributeModel] | type[models.TrialSystemAttributeModel]
_Rows = Mapping[int, Sequence[Any]]  # trial → its rows of one table

_TRIES = 6
_RACES = (1205, 1213, "40001", "40P01")  # what MySQL and PostgreSQL say of a transaction that lost to another one

_distribution = lru_cache(maxsize=2**12)(json_to_distribution)
_as_json = lru_cache(maxsize=2**12)(distribution_to_json)


class TrialRows(RDBStorage):
    """See above."""

    def end_trial(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> None:
        """Write down all that became of a running trial, in one transaction.

        A server that finds two transactions waiting for one another takes one of them back, which is tried again.

        Raises Optuna's `UpdateFinishedTrialError` when it has ended, and `StorageInternalError` when nothing can be
        written.
        """

        def write() -> None:
            with self._transaction() as session:
                trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                self.check_trial_is_updatable(trial_id, trial.state)
                for table, attributes in _tables(user_attrs, system_attrs):
                    if attributes:  # some may be there already
                        old = (table.trial_id == trial_id, table.key.in_(list(attributes)))
                        session.execute(delete(table).where(*old), execution_options={"synchronize_session": False})
                _insert_attributes(session, trial_id, user_attrs, system_attrs)
                for objective, value in enumerate(values or ()):
                    self._set_trial_value_without_commit(session, trial, objective, value)
                trial.state = state
                trial.datetime_complete = datetime.now()

        _until_it_wins(write)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna does, and again where a server took it back."""
        _until_it_wins(lambda: super(TrialRows, self).set_trial_user_attr(trial_id, key, value))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """One trial; raises `KeyError` when there is none."""
        found = self._read([models.TrialModel.trial_id == trial_id])
        return found[0] if found else super().get_trial(trial_id)  # which raises

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: Collection[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Trials of a study: those that are newer than one, and some older ones."""
        ids, study = models.TrialModel.trial_id, models.TrialModel.study_id == study_id
        found = self._read([study, ids > trial_id_greater_than] if trial_id_greater_than > -1 else [study])
        older = sorted(i for i in included_trial_ids if i <= trial_id_greater_than)
        if older:  # those that ran when they were read last: a handful
            found = [*self._read([study, ids.in_(older)]), *found]
        if not found:
            self.get_study_directions(study_id)  # raises where there is no such study
        return [t for t in found if states is None or t.state in states]

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        """Part of the transaction in which a trial is created: attributes and parameters in a statement each."""
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, None, session)
        bare = FrozenTrial(
            number=template_trial.number, trial_id=-1, state=template_trial.state, value=None,
            values=template_trial.values, datetime_start=template_trial.datetime_start,
            datetime_complete=template_trial.datetime_complete, params={}, distributions={}, user_attrs={},
            system_attrs={}, intermediate_values=template_trial.intermediate_values,
        )  # fmt: skip
        trial: Any = super()._get_prepared_new_trial(study_id, bare, session)
        self._insert_params(session, study_id, trial.trial_id, template_trial)
        _insert_attributes(session, trial.trial_id, template_trial.user_attrs, template_trial.system_attrs)
        return trial

    def _insert_params(self, session: Session, study_id: int, trial_id: int, given: FrozenTrial) -> None:
        known: dict[tuple[int, str], BaseDistribution] = vars(self).setdefault("_known", {})
        rows = []
        for name, value in given.params.items():
            ranges = given.distributions[name]
            before = known.get((study_id, name)) or _earlier(session, study_id, name)
            if before is not None:
                check_distribution_compatibility(before, ranges)
            known[study_id, name] = before or ranges
            rows.append(
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": ranges.to_internal_repr(value),
                    "distribution_json": _as_json(ranges),
                }
            )
        if rows:
            session.execute(insert(models.TrialParamModel), rows)

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """One transaction; what the database says becomes Optuna's error."""
        session = self.scoped_session()
        try:
            yield session
            session.commit()
        except SQLAlchemyError as error:
            session.rollback()
            raise StorageInternalError(str(error)) from error
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()

    def _read(self, which: Sequence[Any]) -> list[FrozenTrial]:
        """The trials that meet these conditions, in the order of their ids."""
        trial = models.TrialModel
        with self._transaction() as session:

            def rows(table: Any, *columns: Any) -> _Rows:
                wanted = select(table.trial_id, *columns).join(trial, trial.trial_id == table.trial_id).where(*which)
                return _by_trial(session, wanted)

            found = session.execute(
                select(
                    trial.trial_id, trial.number, trial.state, trial._datetime_start_utc, trial._datetime_complete_utc
                ).where(*which)
            ).all()
            value, param, step = models.TrialValueModel, models.TrialParamModel, models.TrialIntermediateValueModel
            values = rows(value, value.objective, value.value, value.value_type)
            params = rows(param, param.param_id, param.param_name, param.param_value, param.distribution_json)
            steps = rows(step, step.step, step.intermediate_value, step.intermediate_value_type)
            user, system = (rows(t, t.key, t.value_json) for t in (_USER, _SYSTEM))
        made = []
        for number in sorted(found):
            made.append(_trial(*number, *(t.get(number[0], ()) for t in (values, params, steps, user, system))))
        return made


_USER, _SYSTEM = models.TrialUserAttributeModel, models.TrialSystemAttributeModel


def _until_it_wins(write: Callable[[], None]) -> None:
    """Write in a transaction, and once more where a server took it back for another one."""
    for attempt in range(_TRIES):
        try:
            write()
            return
        except StorageInternalError as error:
            if attempt == _TRIES - 1 or not _taken_back(error.__cause__):
                raise
            time.sleep(random.uniform(0, 0.1) * 2**attempt)


def _taken_back(error: BaseException | None) -> bool:
    """Whether a transaction failed for others that ran at the same time, so that it may well work now."""
    said = getattr(error, "orig", None)
    return getattr(said, "sqlstate", None) in _RACES or (getattr(said, "args", None) or [None])[0] in _RACES


def _tables(
    user_attrs: Mapping[str, Any], system_attrs: Mapping[str, Any]
) -> Iterable[tuple[_Attribute, Mapping[str, Any]]]:
    return (_USER, user_attrs), (_SYSTEM, system_attrs)


def _insert_attributes(
    session: Session, trial_id: int, user_attrs: Mapping[str, Any], system_attrs: Mapping[str, Any]
) -> None:
    for table, attributes in _tables(user_attrs, system_attrs):
        if attributes:
            rows = [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in attributes.items()]
            session.execute(insert(table), rows)


def _earlier(session: Session, study_id: int, name: str) -> BaseDistribution | None:
    """The range that a parameter has in the study already."""
    trial, param = models.TrialModel, models.TrialParamModel
    wanted = select(param.distribution_json).join(trial, trial.trial_id == param.trial_id)
    text = session.execute(wanted.where(trial.study_id == study_id, param.param_name == name).limit(1)).scalar()
    return None if text is None else _distribution(text)


def _by_trial(session: Session, wanted: Select[Any]) -> _Rows:
    found: dict[int, list[Any]] = defaultdict(list)
    for row in session.execute(wanted):
        found[row[0]].append(row)
    return found


def _trial(
    trial_id: int, number: int, state: TrialState, start: datetime | None, complete: datetime | None,
    values: Sequence[Any], params: Sequence[Any], steps: Sequence[Any], user: Sequence[Any], system: Sequence[Any],
) -> FrozenTrial:  # fmt: skip
    """What Optuna makes of the same rows."""
    told = [models.TrialValueModel.stored_repr_to_value(v, kind) for _, _, v, kind in sorted(values, key=_second)]
    ranges = {name: _distribution(text) for _, _, name, _, text in sorted(params, key=_second)}
    given = {name: value for _, _, name, value, _ in params}
    between = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    return FrozenTrial(
        trial_id=trial_id,
        number=number,
        state=state,
        value=None,
        values=told or None,
        datetime_start=_local(start),
        datetime_complete=_local(complete),
        params={name: own.to_external_repr(given[name]) for name, own in ranges.items()},
        distributions=ranges,
        user_attrs={key: json.loads(text) for _, key, text in user},
        system_attrs={key: json.loads(text) for _, key, text in system},
        intermediate_values={step: between(value, kind) for _, step, value, kind in steps},
    )


def _local(moment: datetime | None) -> datetime | None:
    """Tables hold UTC, trials the local time."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def _second(row: Sequence[Any]) -> Any:
    return row[1]
