"What the tests of long runs share: images to begin with, a process killed at a moment, and what a run has left."
import shutil, subprocess, time
from readl_nb.training import read_metrics

def copy_samples(root, folder, good, bad, masks=False):
    "So many normal and defective sample images of two categories, in MVTec's layout."
    for category in ('brick', 'leather'):
        images = sorted((root/'sample_data'/category).glob('t*/*/*.jpg'))   # test and train
        chosen = [p for p in images if p.parent.name == 'good'][:good] + [p for p in images if p.parent.name != 'good'][:bad]
        if masks: chosen += [p.parents[2]/'ground_truth'/p.parent.name/f'{p.stem}_mask.png' for p in chosen[good:]]
        for path in chosen: place = folder/path.relative_to(root/'sample_data'); place.parent.mkdir(parents=True, exist_ok=True); shutil.copy(path, place)

def half_a_checkpoint(step, code):
    "`code` in which the second half of the checkpoint at `step` never comes: writing it takes milliseconds, too few to be hit."
    return f'''
import time, transformers
whole = transformers.Trainer._save_rng_state
def half(self, folder): time.sleep(900) if self.state.global_step == {step} else whole(self, folder)
transformers.Trainer._save_rng_state = half
{code}'''

def small_disk(code):
    "`code` in which no file may have more than a megabyte; that of an optimizer is larger."
    return f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); {code}'

def kill_when(moment, command, limit=300):
    "Starts a command and kills it at the moment that is meant, before its end."
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + limit
    while not moment() and process.poll() is None and time.time() < deadline: time.sleep(.005)
    process.kill()
    assert process.wait() == -9 and moment(), 'it was not killed at the moment that was meant'

def flip_a_bit(file):
    content = bytearray(file.read_bytes()); content[len(content) // 2] ^= 1; file.write_bytes(content)

def steps(out): return [{name: value for name, value in line.items() if name != 'seconds'} for line in read_metrics(out)]
def adapter(out): return (out/'adapter'/'adapter_model.safetensors').read_bytes()
def contents(folder): return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}
