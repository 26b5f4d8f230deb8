from fedveil.deploy.lab.api import baselines as baselines
from fedveil.deploy.lab.api import load as load
from fedveil.deploy.lab.api import resume as resume
from fedveil.deploy.lab.api import simulate as simulate
from fedveil.deploy.lab.api import sweep as sweep
from fedveil.deploy.lab.comparison import compare as compare
from fedveil.deploy.lab.partition import Dirichlet as Dirichlet
from fedveil.deploy.lab.partition import Iid as Iid
from fedveil.deploy.lab.partition import Quantity as Quantity
from fedveil.deploy.lab.partition import Shards as Shards
from fedveil.deploy.lab.run import Run as Run
from fedveil.deploy.lab.runs import Runs as Runs
from fedveil.deploy.lab.sites import Sites as Sites
from fedveil.deploy.lab.split import split as split
from fedveil.deploy.lab.tracking import track as track

__version__: str
