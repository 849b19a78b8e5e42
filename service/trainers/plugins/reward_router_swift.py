"""ms-swift's plugin: `--external_plugins` takes the path of this file, `--reward_funcs reward_router` the function."""

from service.trainers.ms_swift import register

register()
