"""What may be zero: which leaves are governed, and how their zeros may lie."""

from sparsejax.patterns._frames import geometric_frames as geometric_frames
from sparsejax.patterns._frames import stepwise_frames as stepwise_frames
from sparsejax.patterns._leaves import Leaf as Leaf
from sparsejax.patterns._leaves import PatternTree as PatternTree
from sparsejax.patterns._leaves import StackedTree as StackedTree
from sparsejax.patterns._leaves import check_patterns as check_patterns
from sparsejax.patterns._leaves import governed as governed
from sparsejax.patterns._leaves import is_default_governed as is_default_governed
from sparsejax.patterns._patterns import NM as NM
from sparsejax.patterns._patterns import Block as Block
from sparsejax.patterns._patterns import Channel as Channel
from sparsejax.patterns._patterns import Pattern as Pattern
from sparsejax.patterns._patterns import Unstructured as Unstructured
from sparsejax.patterns._prefix import broadcast_prefix as broadcast_prefix
from sparsejax.patterns._sparsity import check_sparsity as check_sparsity
