-- Give a run's name an identity if it has none, and note that the store is watched.
--
-- The mark in KEYS[2] says since when somebody has watched the store without a break. A store that loses its runs loses
-- the mark too, so a young mark means: a name that looks unused may be one that a gateway holds and has not yet missed.
--
-- KEYS[1]  the run's identity
-- KEYS[2]  the mark: the server's time at which it was set, ms
-- ARGV[1]  the identity that the run gets
-- ARGV[2]  how long the mark must have stood before an unused name is given away, ms; 0: give it away at once
-- ARGV[3]  how long the mark lives after the last call, ms
--
-- Returns {identity that stands}, or {false, ms until the name may be taken}.

local clock = redis.call("TIME")
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local since = tonumber(redis.call("GET", KEYS[2]))
if not since or since > now then
  since = now
end
redis.call("SET", KEYS[2], string.format("%.0f", since), "PX", ARGV[3])

local standing = redis.call("GET", KEYS[1])
if standing then
  return {standing}
end
local left = tonumber(ARGV[2]) - (now - since)
if left > 0 then
  return {false, left}
end
redis.call("SET", KEYS[1], ARGV[1])
return {ARGV[1]}
