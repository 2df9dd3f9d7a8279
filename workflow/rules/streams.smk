"""Windows of a store, and streams: training splits whose windows are deleted once SAEs were trained on them (stores.NAME.keep_windows).

Draws count the windows of all epochs: of n windows, draw d is window d mod n. For each draw of a stream one job extracts (in parts),
one merges (stores.smk), and one trains each group of SAEs (training.smk). SAEs whose k another SAE finds (mean_l0_of) are trained
when that one is: their draws come after all others', from window 0 on.

    extract d -> merge d -> train on d -> extract d + keep_windows
                 merge d -> extract d + 1
                            train on d -> train on d + 1 -> ... -> SAE

results/stores/SOURCE/train.windows/D, D.json and results/saes.groups/GROUP.D.done are temporary, so that Snakemake deletes a
window when the last group was trained on it. The JSON files of an epoch become the store without rows.
"""

import shutil

from saeflow.provenance import stream_of

# Groups of SAEs that are trained window by window, also where one job trains one SAE.
STREAMED = Groups(
    (
        [jobs.sae(run) for run in runs]
        for runs in plan.training_groups
        if plan.is_streamed(plan.runs[runs[0]].source)
    ),
    least=1,
)


def window(source, split, number):
    """The folder of a window of a split, or of a draw of a stream."""
    return f"results/stores/{source}/{split}.windows/{number}"


def facts(source, split, number):
    """The file of a window's attributes."""
    return f"{window(source, split, number)}.json"


def merged_from(source, split):
    """Files that a store is made from: its parts, or its windows where there are several, of a stream their attributes."""
    count = plan.windows(source, split)
    if count == 1:
        return parts(source, split, 0)
    if split == "evaluation" or not plan.is_streamed(source):
        return [window(source, split, number) for number in range(count)]
    # Windows that an SAE added later needs are no reason to write the store again.
    is_made = jobs.store(source, split).is_made
    return [] if is_made else [facts(source, split, number) for number in range(count)]


def extracted_after(source, split, number):
    """Files that a window is extracted after: the one before; of a stream, training on the one whose place on the disk it takes."""
    if split == "evaluation" or not plan.is_streamed(source):
        return [facts(source, split, number - 1)] if number else []
    before = [draw for draw in draws_left(source) if draw < number]
    found = [facts(source, split, draw) for draw in before[-1:]]
    keep = config["stores"][source]["keep_windows"]
    if len(before) >= keep:
        gone = before[-keep]
        found += [
            trained_on(group, gone - first_draw(group))
            for group in left_of(source)
            if gone in draws(group)
        ]
    return found


def draws_left(source):
    """Draws of a stream that are extracted, in order: those of the groups that are left, and one of each window for a missing store."""
    is_made = jobs.store(source, "train").is_made
    found = set() if is_made else set(range(plan.windows(source, "train")))
    return sorted(found.union(*map(draws, left_of(source))))


def left_of(source):
    """Groups of a stream of which an SAE is missing or out of date."""
    return [
        group
        for group, members in STREAMED.members.items()
        if source_of(group) == source and not all(job.is_made for job in members)
    ]


def draws(group):
    """Draws that a group is trained on."""
    first = first_draw(group)
    return range(first, first + draws_of(group))


def first_draw(group):
    """The first draw that a group is trained on."""
    return plan.first_draw(name_of(STREAMED.members[group][0]))


def draws_of(group):
    """Number of draws that a group is trained on."""
    return plan.draws(source_of(group), map(name_of, STREAMED.members[group]))


def learned_before(group):
    """Records of what training of a group reads beside windows: probes, and SAEs that find its k."""
    runs = [plan.runs[name_of(job)] for job in STREAMED.members[group]]
    guides = {run.guide for run in runs if run.guide}
    probes = {
        (run.source, run.hook_point, plan.complexity(run.name))
        for run in runs
        if plan.complexity(run.name)
    }
    return records(
        [
            *(jobs.sae(guide) for guide in sorted(guides)),
            *(jobs.probe(*probe) for probe in sorted(probes)),
        ]
    )


def source_of(group):
    """The source of a group."""
    return plan.runs[name_of(STREAMED.members[group][0])].source


def name_of(job):
    """The name of an SAE's run."""
    return job.result.removeprefix("saes/")


def trained_on(group, number):
    """The file that says that a group was trained on a draw, by its number among the group's own."""
    return f"results/saes.groups/{group}.{number}.done"


def trained_before(job):
    """Files that an SAE's own job waits for: its group, of a stream on its last draw; nothing where the SAE is there."""
    group = STREAMED.of(job)
    if group is None:
        return done_of("results/saes.groups", TRAINED, job)
    return [] if job.is_made else trained_on(group, draws_of(group) - 1)


def delete_what_streams_left():
    """Delete what killed runs left: windows that all SAEs were trained on, and the states of SAEs that are made."""
    for source in filter(plan.is_streamed, plan.sources):
        for path in Path("results/stores", source, "train.windows").glob("[0-9]*"):
            if path.name.isdigit() and all(
                is_behind(group, int(path.name)) for group in left_of(source)
            ):
                shutil.rmtree(path)
    for group, members in STREAMED.members.items():
        made = [job for job in members if job.is_made]
        for job in made:
            shutil.rmtree(stream_of(job.path), ignore_errors=True)
        if len(made) == len(members):
            for path in Path("results/saes.groups").glob(f"{group}.*.done"):
                path.unlink()


def is_behind(group, number):
    """Tell whether a group was trained on a draw, and perhaps on later ones, or never is."""
    own = number - first_draw(group)
    return number not in draws(group) or any(
        Path(trained_on(group, later)).exists() for later in range(own, draws_of(group))
    )
