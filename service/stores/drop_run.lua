-- Delete some of a run's keys; its identity first, so that nobody finds a part of a run.
--
-- KEYS[1]  the run's identity
-- ARGV[1]  prefix of the run's keys, with the hash tag
-- ARGV[2]  cursor: "0" at first, then what the last call returned
--
-- Returns the next cursor; "0" when all are gone.

if ARGV[2] == "0" then
  redis.call("DEL", KEYS[1])
end
local found = redis.call("SCAN", ARGV[2], "MATCH", ARGV[1] .. "*", "COUNT", 1000)
for _, key in ipairs(found[2]) do
  redis.call("UNLINK", key)
end
return found[1]
