-- Apply one feedback exactly once: find the decision, look at its marker, then append the event and set the marker.
--
-- KEYS[1]  the run's log (stream)
-- KEYS[2]  the reference: `...:d:<id>` (a decision) or `...:c:<hash>` (the alias of a content's latest decision)
-- KEYS[3]  the run's identity
-- ARGV[1]  prefix of the run's keys, with the hash tag: the keys built from it live on the node of KEYS
-- ARGV[2]  the decision id, or "" when KEYS[2] is an alias
-- ARGV[3]  value of the feedback, any bytes
-- ARGV[4]  preferred response index, or "" when the signal is not a preference
-- ARGV[5]  how long the marker lives, ms; longer than any decision, so that a marked decision is never unmarked
-- ARGV[6]  "1" when the caller waits for replicas: a repetition then writes too, since WAIT waits for writes of its own
--          connection only, and the first one may not have reached the replicas yet
-- ARGV[7]  the identity that the caller holds the run by, or "" for whatever stands
--
-- Returns {status, decision id, event id, standing value}, shorter where there is nothing to say. Status `missing`:
-- neither decision nor marker; the caller tells unknown from expired. Status `lost`: the run has another identity, or
-- none, so that its log is not the one that the caller's events went to.

local prefix, id, value, preferred, marker_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

if ARGV[7] ~= "" and redis.call("GET", KEYS[3]) ~= ARGV[7] then
  return {"lost"}
end

if id == "" then
  id = redis.call("GET", KEYS[2])
  if not id then
    return {"missing"}
  end
end

-- A marker is "<event id> <value>". An event id holds no space; a value may hold anything.
local marker_key = prefix .. "f:" .. id
local marker = redis.call("GET", marker_key)
if marker then
  if ARGV[6] == "1" then
    redis.call("PEXPIRE", marker_key, marker_ms)
  end
  local space = string.find(marker, " ", 1, true)
  local event_id, standing = string.sub(marker, 1, space - 1), string.sub(marker, space + 1)
  if standing == value then
    return {"duplicate", id, event_id}
  end
  return {"conflict", id, event_id, standing}
end

-- A decision is "<n> <payload>". The payload itself cannot be read here: cmsgpack knows no binary strings.
local decision = redis.call("GET", prefix .. "d:" .. id)
if not decision then
  return {"missing", id}
end
local space = string.find(decision, " ", 1, true)
if preferred ~= "" then
  local index, n = tonumber(preferred), tonumber(string.sub(decision, 1, space - 1))
  if index < 0 or index >= n then
    return {"out_of_range", id}
  end
end

-- The append comes first: it is the one that can be refused (a log key of another type), and a refusal here leaves
-- nothing behind. The server checks memory and disk before the first write of a script only.
local event_id = redis.call("XADD", KEYS[1], "*", "d", id, "p", string.sub(decision, space + 1), "s", value)
redis.call("SET", marker_key, event_id .. " " .. value, "PX", marker_ms)
-- The log holds the decision now, and its marker answers for it: most decisions need not wait for their time to end.
redis.call("DEL", prefix .. "d:" .. id)
return {"applied", id, event_id}
