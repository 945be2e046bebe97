"""What the examples share: byte-level data, the loop, checkpoints, and the report."""

from sparsejax.training._bytes import ByteText as ByteText
from sparsejax.training._bytes import require_length as require_length
from sparsejax.training._bytes import sample_batch as sample_batch
from sparsejax.training._bytes import standard_library_text as standard_library_text
from sparsejax.training._bytes import text_from_files as text_from_files
from sparsejax.training._bytes import validation_batches as validation_batches
from sparsejax.training._checkpoint import restore_checkpoint as restore_checkpoint
from sparsejax.training._checkpoint import save_checkpoint as save_checkpoint
from sparsejax.training._export import load_weights as load_weights
from sparsejax.training._export import save_weights as save_weights
from sparsejax.training._files import write_atomic as write_atomic
from sparsejax.training._loop import Stopped as Stopped
from sparsejax.training._loop import TrainState as TrainState
from sparsejax.training._loop import fit as fit
from sparsejax.training._report import draw_report as draw_report
from sparsejax.training._report import markdown_table as markdown_table
from sparsejax.training._runs import Run as Run
from sparsejax.training._runs import open_run as open_run
