"What has to hold for `readl_train` as a user runs it: killed, out of disk, damaged or misused, it goes on or says why not in one sentence."
import json, math, shutil, subprocess, sys
from pathlib import Path
import pytest
from helpers import adapter, contents, copy_samples, flip_a_bit, half_a_checkpoint, kill_when, small_disk, steps
from readl_nb.commands import readl_train
from readl_nb.training import checkpoints, damage, last_whole, read_metrics, seal

CODE = 'import sys; from readl_nb.commands import readl_train; sys.exit(readl_train())'
COMMAND = [sys.executable, '-c', CODE]
SETTINGS = 'prompts_per_step: 2\ngenerations: 2\nmax_new_tokens: 48\nsave_steps: 1\nmicro_batch: 4\ntemperature: 1.5\nlearning_rate: 1e-3\nmax_steps: 4\n'

@pytest.fixture(scope='module')
def made(tmp_path_factory, root):
    "A folder with data (two categories, eight images), settings, and a run of four steps that nobody disturbed."
    folder = tmp_path_factory.mktemp('train')
    copy_samples(root, folder/'data', good=2, bad=2)
    (folder/'settings.yaml').write_text(SETTINGS)
    done = subprocess.run(command(folder, folder/'run'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/'said.txt').write_text(done.stderr)
    return folder

def command(made, out, *more, start=COMMAND, data='data'):
    return [*start, '--method', 'cgro', '--data', str(made/data), '--config', str(made/'settings.yaml'), '--out', str(out), '--device', 'cpu', *map(str, more)]

def here(capsys, made, out, *more, **options):
    "Exit code and standard error of the command, in this process."
    capsys.readouterr(); code = readl_train(command(made, out, *more, start=[], **options))
    return code, capsys.readouterr().err

def said(out): return [(out/'completions'/f'completions_{n:05}.parquet').read_bytes() for n in range(1, 5)]
def copy(made, tmp_path): return Path(shutil.copytree(made/'run', tmp_path/'run'))

def test_a_whole_run_leaves_what_it_promises(made):
    out, told = made/'run', (made/'said.txt').read_text()
    lines = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    wanted = {'reward', 'reward/format', 'reward/accuracy', 'reward/consistency', 'reward/std', 'jaccard', 'kl', 'zero_variance_groups', 'clip_fraction', 'completion_length', 'malformed', 'loss'}
    assert all(wanted <= line.keys() for line in lines) and all(math.isfinite(line['reward']) for line in lines)
    assert sorted(p.name for p in out.iterdir() if p.name != 'runs') == ['adapter', 'checkpoint-3', 'checkpoint-4', 'completions', 'metrics.jsonl', 'run.json']   # runs is TensorBoard's
    assert sorted(p.name for p in (out/'adapter').iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
    assert json.loads((out/'adapter'/'adapter_config.json').read_text())['base_model_name_or_path'] == 'readl-tiny'
    assert 'completion' in told and 'GiB' in told and told.count('step ') == 4

def test_tensorboard_shows_the_run_where_it_is_installed(made):
    pytest.importorskip('tensorboard')
    assert list((made/'run').rglob('events.out.tfevents*'))

@pytest.mark.parametrize('code, moment, sentence', [
    (CODE, lambda out: (out/'run.json').exists(), None), (CODE, lambda out: len(read_metrics(out)) >= 2, 'goes on from checkpoint-'),
    (half_a_checkpoint(2, CODE), lambda out: any((out/'checkpoint-2').glob('optimizer.pt')), 'checkpoint-2 is not used: it is unfinished; it is removed and the run goes on from checkpoint-1')], ids=['before a checkpoint', 'after line 2', 'within a checkpoint'])
def test_killed_it_goes_on_as_if_nothing_had_been(made, tmp_path, capsys, code, moment, sentence):
    out = tmp_path/'run'
    kill_when(lambda: moment(out), command(made, out, '--max-steps', 400, start=[sys.executable, '-c', code]))   # longer than anyone waits
    assert len(read_metrics(out)) < 4
    assert sentence or not checkpoints(out)
    status, error = here(capsys, made, out)
    assert status == 0 and (sentence in error if sentence else 'checkpoint' not in error), error
    assert steps(out) == steps(made/'run') and said(out) == said(made/'run')
    assert adapter(out) == adapter(made/'run')

def test_damaged_newest_checkpoint_the_one_before_is_used(made, tmp_path, capsys):
    out = copy(made, tmp_path); flip_a_bit(out/'checkpoint-4'/'optimizer.pt')
    code, error = here(capsys, made, out)
    assert code == 0 and 'checkpoint-4 is not used: optimizer.pt is damaged' in error and 'goes on from checkpoint-3' in error, error
    assert steps(out) == steps(made/'run') and said(out) == said(made/'run')

def test_only_damaged_checkpoints_nothing_is_thrown_away(made, tmp_path, capsys):
    out = copy(made, tmp_path)
    (out/'checkpoint-4'/'complete.json').unlink(); (out/'checkpoint-3'/'optimizer.pt').write_bytes(b'')
    before = contents(out)
    code, error = here(capsys, made, out)
    assert code == 1 and 'no checkpoint is whole (checkpoint-3: optimizer.pt is damaged); move them away' in error and error.count('\n') == 1, error
    assert contents(out) == before

def test_full_disk_keeps_the_checkpoint_before(made, tmp_path):
    out = copy(made, tmp_path); before = contents(out/'checkpoint-4')
    done = subprocess.run(command(made, out, '--max-steps', 5, start=[sys.executable, '-c', small_disk(CODE)]), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    assert 'checkpoint-5 could not be saved' in done.stderr and 'checkpoint-4 is kept' in done.stderr
    assert not (out/'checkpoint-5').exists() and contents(out/'checkpoint-4') == before and last_whole(out) == (out/'checkpoint-4', [])

@pytest.mark.parametrize('harm, wrong', [(lambda f: (f/'complete.json').unlink(), 'unfinished'), (lambda f: (f/'complete.json').write_text('{'), 'complete.json is damaged'),
    (lambda f: (f/'rng_state.pth').unlink(), 'rng_state.pth is missing'), (lambda f: (f/'adapter_model.safetensors').write_bytes(b''), 'adapter_model.safetensors is damaged')])
def test_checkpoints_that_are_not_whole_are_known(made, tmp_path, harm, wrong):
    out = copy(made, tmp_path); harm(out/'checkpoint-4')
    assert wrong in damage(out/'checkpoint-4') and last_whole(out)[0] == out/'checkpoint-3'

def test_finished_run_has_nothing_to_do(made, tmp_path, capsys):
    out = copy(made, tmp_path); before = contents(out)
    code, error = here(capsys, made, out)
    assert code == 0 and 'nothing to do' in error
    assert contents(out) == before

@pytest.mark.parametrize('harm', [lambda out: shutil.copy(out/'checkpoint-3'/'adapter_model.safetensors', out/'adapter'), lambda out: (out/'adapter'/'adapter_model.safetensors').unlink(),
                                  lambda out: (out/'adapter'/'adapter_config.json').unlink(), lambda out: shutil.rmtree(out/'adapter')], ids=['of an earlier step', 'no weights', 'no settings', 'none'])
def test_adapter_that_is_not_of_the_last_checkpoint_is_made_again(made, tmp_path, capsys, harm):
    out = copy(made, tmp_path); before = contents(out); harm(out); assert contents(out) != before
    code, error = here(capsys, made, out)
    assert code == 0 and 'has its 4 steps already: its adapter is made again' in error and contents(out) == before, error

def test_run_of_an_older_version_goes_on(made, tmp_path, capsys):
    out = copy(made, tmp_path); record = json.loads((out/'run.json').read_text())
    assert 'opposites' not in record and set(record['data']) == {'images', 'anomalous', 'sha256'}, 'a run without references or opposites has a record as always'
    code, error = here(capsys, made, out, '--max-steps', 5)
    assert code == 0 and 'goes on from checkpoint-4' in error, error

def test_adapter_that_does_not_fit(made, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    out = copy(made, tmp_path); file = out/'checkpoint-4'/'adapter_model.safetensors'
    save_file({name: weight[:8].contiguous() if 'lora_A' in name else weight for name, weight in load_file(file).items()}, file); seal(out/'checkpoint-4')
    code, error = here(capsys, made, out, '--max-steps', 5)
    assert code == 1 and 'its adapter does not fit the model' in error and error.count('\n') == 2, error   # what it goes on from, and why it cannot

def test_unreadable_image_is_replaced_counted_and_named(made, tmp_path, capsys):
    shutil.copytree(made/'data', tmp_path/'data'); shutil.copy(made/'settings.yaml', tmp_path)
    bad = sorted((tmp_path/'data').glob('leather/test/good/*'))[-1]; bad.write_bytes(bad.read_bytes()[:999])
    code, error = here(capsys, tmp_path, tmp_path/'run')
    assert code == 0, error
    assert [path for line in read_metrics(tmp_path/'run') for path in line['unreadable']] == [str(bad)]
    assert '1 image could not be read' in error and bad.name in error

def test_reward_that_is_not_a_number_stops_it(made, tmp_path, capsys, monkeypatch):
    import readl_nb.rewards as rewards
    right, calls = rewards.accuracy_reward, []
    def broken(*arguments): calls.append(0); return right(*arguments) if len(calls) < 9 else math.nan   # 4 in the dry run, 4 in the first step
    monkeypatch.setattr(rewards, 'accuracy_reward', broken)
    code, error = here(capsys, made, tmp_path/'run')
    assert code == 1 and 'the accuracy reward is nan at step 2' in error and 'Traceback' not in error, error
    assert last_whole(tmp_path/'run')[0].name == 'checkpoint-1' and len(read_metrics(tmp_path/'run')) == 1

def test_loss_that_is_not_a_number_stops_it(tmp_path):
    from types import SimpleNamespace
    from datasets import Dataset
    from readl_nb.grpo import CGROConfig
    from readl_nb.datasets import with_images
    from readl_nb.training import RunRecorder
    data = Dataset.from_dict({'path': ['a'], 'label': [0]})
    recorder = RunRecorder(tmp_path, CGROConfig(), with_images(data), print)
    for name in ('loss', 'grad_norm'):
        with pytest.raises(ValueError, match=f'the {name} is nan at step 3'): recorder.on_log(None, SimpleNamespace(global_step=3), None, logs={'loss': 0., name: math.nan})
    assert not list(tmp_path.iterdir())

def one_class(folder):
    for kind in (folder/'data').glob('*/test/*'): kind.name == 'good' or shutil.rmtree(kind)
def foreign(folder): (folder/'run').mkdir(); (folder/'run'/'notes.txt').write_text('mine')
def a_file(folder): (folder/'run').write_text('mine')

@pytest.mark.parametrize('change, more, sentence', [
    (one_class, (), 'training needs both classes'), (foreign, (), "holds 'notes.txt' and no run"), (a_file, (), 'this is a file'),
    ('learning_rte: 1', (), "no setting 'learning_rte'; did you mean 'learning_rate'"), ('real: {alhpa: 1}', (), "did you mean 'alpha'"), ('generations: 1', (), 'use 2 or more'),
    ('generations: two', (), 'use a whole number'), ('- 3', (), 'no list of settings'), ('a: [', (), 'no YAML'), ('prompts_per_step: 100', (), 'fewer than the 100'),
    ('micro_batch: 3', (), 'do not divide'), ('question: What is this?', (), 'defect'), ('', ('--categories', 'marble'), 'marble'), ('', ('--device', 'cuda:77'), 'is not there'), ('', ('--model', 'no/such/model'), 'no/such/model')])
def test_bad_input_is_one_sentence_and_nothing_is_overwritten(made, tmp_path, capsys, change, more, sentence):
    if callable(change): shutil.copytree(made/'data', tmp_path/'data'); shutil.copy(made/'settings.yaml', tmp_path); change(tmp_path)
    else: (tmp_path/'data').symlink_to(made/'data'); (tmp_path/'settings.yaml').write_text(change if change in ('- 3', 'a: [') else SETTINGS + change + '\n')
    before = contents(tmp_path)
    code, error = here(capsys, tmp_path, tmp_path/'run', *more)
    assert code == 1 and sentence in error and error.count('\n') == 1, error
    assert contents(tmp_path) == before

def test_folder_with_another_run(made, tmp_path, capsys):
    out = copy(made, tmp_path); before = contents(out)
    for more, first in ((('--seed', 5), 'seed is 0 there and 5 here'), (('--categories', 'brick'), 'images of the data is 8 there and 4 here'), (('--method', 'r1'), 'method is "cgro" there and "r1" here')):
        code, error = here(capsys, made, out, *more)
        assert code == 1 and 'holds another run' in error and first in error and error.count('\n') == 1, error
    assert contents(out) == before

def test_interrupted_it_says_how_to_go_on(made, tmp_path, capsys, monkeypatch):
    import readl_nb.training as training
    def interrupted(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(training, 'go', interrupted)
    code, error = here(capsys, made, tmp_path/'run')
    assert code == 130 and 'the same command goes on from the last checkpoint' in error

def test_wrong_usage_ends_with_2(capsys):
    for wrong in ([], ['--method', 'ppo', '--data', 'd', '--out', 'o'], ['--method', 'r1', '--data', 'd'], ['--method', 'r1', '--data', 'd', '--out', 'o', '--max-steps', '0']):
        with pytest.raises(SystemExit) as stop: readl_train(wrong)
        assert stop.value.code == 2 and 'usage: readl_train' in capsys.readouterr().err

# --- anomaly_r1 ---

def anomaly(out, *more, data='texts'): return ['--method', 'anomaly_r1', '--data', str(data), '--out', str(out), '--device', 'cpu', *map(str, more)]

def test_anomaly_r1_gets_what_the_command_says(tmp_path, capsys, monkeypatch):
    import readl_nb.anomaly_r1 as anomaly_r1
    seen = []
    monkeypatch.setattr(anomaly_r1, 'train_anomaly_r1', lambda *given: seen.append(given) or tmp_path/'run'/'adapter')
    assert readl_train(anomaly(tmp_path/'run', '--adapter', 'cold', '--max-steps', 8, '--no-contrastive', '--knowledge', '--seed', 3)) == 0
    data, out, config, model, adapter, device = seen[0]
    assert (data, out, model, adapter, device) == ('texts', str(tmp_path/'run'), 'readl-tiny-boxes', 'cold', 'cpu')
    assert (config.max_steps, config.contrastive, config.knowledge, config.reference, config.reasoning, config.seed, config.opposite) == (8, False, True, True, True, 3, 'masks')
    assert readl_train(anomaly(tmp_path/'run', '--model', 'another')) == 0
    assert seen[1][2] == anomaly_r1.AnomalyR1Config() and seen[1][4] is None, 'another model has the settings of the paper'
    (tmp_path/'mine.yaml').write_text('generations: 4\npenalty: 0.5\n')
    assert readl_train(anomaly(tmp_path/'run', '--config', tmp_path/'mine.yaml')) == 0
    assert (seen[2][2].generations, seen[2][2].penalty, seen[2][2].opposite) == (4, .5, 'policy')
    assert 'the adapter is in' in capsys.readouterr().err

@pytest.mark.parametrize('method, more', [('anomaly_r1', ('--split', 'train')), ('anomaly_r1', ('--categories', 'brick')), ('anomaly_r1', ('--defects', 'hole')), ('cgro', ('--adapter', 'cold')), ('r1', ('--knowledge',)), ('cgro', ('--no-contrastive',))])
def test_options_of_another_method_end_with_2(tmp_path, capsys, method, more):
    with pytest.raises(SystemExit) as stop: readl_train(['--method', method, '--data', 'd', '--out', str(tmp_path/'run'), *more])
    assert stop.value.code == 2 and f'{more[0]} does not go with --method {method}' in capsys.readouterr().err and not (tmp_path/'run').exists()

@pytest.mark.parametrize('text, more, sentence', [('', (), 'readl_explain'), ('penlty: 1', (), "did you mean 'penalty'"), ('method: cgro', (), "no setting 'method'"), ('generations: 1', (), 'use 2 or more'), ('max_steps: 7', (), 'a multiple of'),
                                                  ('', ('--adapter', 'no/such/adapter'), 'no/such/adapter: it holds no adapter; give')])
def test_anomaly_r1_with_bad_input_is_one_sentence(made, tmp_path, capsys, text, more, sentence):
    (tmp_path/'settings.yaml').write_text(text or 'max_steps: 4\n')
    code = readl_train(anomaly(tmp_path/'run', '--config', tmp_path/'settings.yaml', *more, data=made/'data'))   # images, no explanations
    error = capsys.readouterr().err
    assert code == 1 and sentence in error and error.count('\n') == 1 and not (tmp_path/'run').exists(), error
