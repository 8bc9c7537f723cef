BEGIN TRANSACTION;
CREATE TABLE blobs (
	sha256 VARCHAR(64) NOT NULL, 
	byte_count BIGINT NOT NULL, 
	data BLOB, 
	PRIMARY KEY (sha256)
);
INSERT INTO "blobs" VALUES('9628e545ed3ac074e5a6cbf542a642b62482fbfca9b4cb3ea4743a1874256e37',64,X'0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F');
INSERT INTO "blobs" VALUES('e867e3bcd86c436421da98b259dbde6a6aec42bdea756d25e98c4973b3611558',64,X'0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F0000A03F');
INSERT INTO "blobs" VALUES('26ba44a66ca6559c6b8c9e2540741d236386d2f0bc84faaf7fd70c73f4b33dfc',64,X'0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F0000C03F');
INSERT INTO "blobs" VALUES('bf3800af6d64acbd92c28bfd9d1a6ad9ea297f6ab0c266fa22e3c33ba90227b1',64,X'00003041000030410000304100003041000030410000304100003041000030410000304100003041000030410000304100003041000030410000304100003041');
INSERT INTO "blobs" VALUES('5861e4845095d61028049d3d57df4589154db65a6691fb1bcb3759d2f8d1479e',64,X'0000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A8410000A841');
INSERT INTO "blobs" VALUES('6a7bb757331ba0a922aeba771882f599e095b72846cd061a3c0c74f786d4f41e',64,X'00004040000040400000404000004040000040400000404000004040000040400000404000004040000040400000404000004040000040400000404000004040');
INSERT INTO "blobs" VALUES('bbbb02687df576b7500a736e426f4d972ad168ffd1bf8e4f5cae30c286c10785',64,X'00006040000060400000604000006040000060400000604000006040000060400000604000006040000060400000604000006040000060400000604000006040');
INSERT INTO "blobs" VALUES('eb3fc244aa7601d93346a50d34a2d8b780af207991de6df9c9639c9149a20596',64,X'00004041000040410000404100004041000040410000404100004041000040410000404100004041000040410000404100004041000040410000404100004041');
INSERT INTO "blobs" VALUES('adcf1b363b34e44999f444c8df8a38ac153b3326a0f924704c76a269ed5deacc',64,X'0000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B0410000B041');
INSERT INTO "blobs" VALUES('7e324876e4818aa5b4c4721ebb90090200999274687d9a4588063276cbbfc931',64,X'0000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F0410000F041');
INSERT INTO "blobs" VALUES('af44da91369e453059e36873ca3b5f2fecd3d7b30553b177302d6fcd4454ccac',1048580,NULL);
INSERT INTO "blobs" VALUES('649da20be4f2a1ecdb5797a148d137bcca77829881313d0e0fd700cee5e659bf',64,X'00004842000048420000484200004842000048420000484200004842000048420000484200004842000048420000484200004842000048420000484200004842');
INSERT INTO "blobs" VALUES('2cf10a34ccb9f616c70fea4e405e1d651802ffccb3fbbb80b72420afeb693e58',64,X'00004942000049420000494200004942000049420000494200004942000049420000494200004942000049420000494200004942000049420000494200004942');
CREATE TABLE checkpoints (
	experiment_id VARCHAR(63) NOT NULL, 
	round_number INTEGER NOT NULL, 
	document TEXT NOT NULL, 
	PRIMARY KEY (experiment_id, round_number)
);
INSERT INTO "checkpoints" VALUES('done',0,'{"experiment_id":"done","round_number":0,"shared":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"9628e545ed3ac074e5a6cbf542a642b62482fbfca9b4cb3ea4743a1874256e37"},"memory":null}');
INSERT INTO "checkpoints" VALUES('done',1,'{"experiment_id":"done","round_number":1,"shared":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"bf3800af6d64acbd92c28bfd9d1a6ad9ea297f6ab0c266fa22e3c33ba90227b1"},"memory":{"headers":[{"name":"momentum/context","element_type":"<f4","shape":[2,8]}],"sha256":"5861e4845095d61028049d3d57df4589154db65a6691fb1bcb3759d2f8d1479e"}}');
INSERT INTO "checkpoints" VALUES('done',2,'{"experiment_id":"done","round_number":2,"shared":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"eb3fc244aa7601d93346a50d34a2d8b780af207991de6df9c9639c9149a20596"},"memory":{"headers":[{"name":"momentum/context","element_type":"<f4","shape":[2,8]}],"sha256":"adcf1b363b34e44999f444c8df8a38ac153b3326a0f924704c76a269ed5deacc"}}');
INSERT INTO "checkpoints" VALUES('cancelled',0,'{"experiment_id":"cancelled","round_number":0,"shared":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"7e324876e4818aa5b4c4721ebb90090200999274687d9a4588063276cbbfc931"},"memory":null}');
INSERT INTO "checkpoints" VALUES('active',0,'{"experiment_id":"active","round_number":0,"shared":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"649da20be4f2a1ecdb5797a148d137bcca77829881313d0e0fd700cee5e659bf"},"memory":null}');
INSERT INTO "checkpoints" VALUES('pending',0,'{"experiment_id":"pending","round_number":0,"shared":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"9628e545ed3ac074e5a6cbf542a642b62482fbfca9b4cb3ea4743a1874256e37"},"memory":null}');
CREATE TABLE events (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	time FLOAT NOT NULL, 
	experiment_id VARCHAR(63) NOT NULL, 
	document TEXT NOT NULL
);
INSERT INTO "events" VALUES(1,1000.0,'','{"kind": "SiloChanged", "event": {"silo": {"silo_id": "north", "software_version": "0.4.0", "device": "cpu", "methods": [], "last_seen_time": 999.0, "connected": true, "draining": false}}}');
INSERT INTO "events" VALUES(2,1100.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "pending", "round_number": 1, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(3,1100.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "running", "round_number": 1, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(4,1102.0,'done','{"kind": "RoundClosed", "event": {"experiment_id": "done", "round_number": 1, "kind": "train", "attempt": 0, "contributions": [{"silo_id": "north", "example_count": 10, "metrics": {"loss": 0.5}, "work_duration": 1.5, "byte_count": 64}], "absences": [], "metrics": {"loss": 0.5}, "succeeded": true, "duration": 2.0}}');
INSERT INTO "events" VALUES(5,1102.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "running", "round_number": 2, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(6,1112.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "running", "round_number": 2, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(7,1112.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "running", "round_number": 2, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(8,1112.0,'done','{"kind": "RoundClosed", "event": {"experiment_id": "done", "round_number": 2, "kind": "train", "attempt": 0, "contributions": [{"silo_id": "north", "example_count": 10, "metrics": {"loss": 0.5}, "work_duration": 1.5, "byte_count": 64}], "absences": [], "metrics": {"loss": 0.5}, "succeeded": true, "duration": 2.0}}');
INSERT INTO "events" VALUES(9,1112.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "running", "round_number": 2, "kind": "evaluate", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(10,1122.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "running", "round_number": 2, "kind": "evaluate", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(11,1122.0,'done','{"kind": "ExperimentChanged", "event": {"experiment_id": "done", "state": "succeeded", "round_number": 2, "kind": "evaluate", "message": "", "end_time": 1122.0}}');
INSERT INTO "events" VALUES(12,1222.0,'cancelled','{"kind": "ExperimentChanged", "event": {"experiment_id": "cancelled", "state": "pending", "round_number": 1, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(13,1222.0,'cancelled','{"kind": "ExperimentChanged", "event": {"experiment_id": "cancelled", "state": "running", "round_number": 1, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(14,1228.0,'cancelled','{"kind": "ExperimentChanged", "event": {"experiment_id": "cancelled", "state": "cancelled", "round_number": 1, "kind": "train", "message": "cancelled by an operator", "end_time": 1228.0}}');
INSERT INTO "events" VALUES(15,1328.0,'active','{"kind": "ExperimentChanged", "event": {"experiment_id": "active", "state": "pending", "round_number": 1, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(16,1328.0,'active','{"kind": "ExperimentChanged", "event": {"experiment_id": "active", "state": "running", "round_number": 1, "kind": "train", "message": "", "end_time": null}}');
INSERT INTO "events" VALUES(17,1379.0,'pending','{"kind": "ExperimentChanged", "event": {"experiment_id": "pending", "state": "pending", "round_number": 0, "kind": "evaluate", "message": "", "end_time": null}}');
CREATE TABLE experiments (
	experiment_id VARCHAR(63) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	create_time FLOAT NOT NULL, 
	document TEXT NOT NULL, 
	PRIMARY KEY (experiment_id)
);
INSERT INTO "experiments" VALUES('done','succeeded',1100.0,'{"experiment_id":"done","spec":{"local":{"method_name":"promptfl","hyperparameters_json":"{\"context_init\":null,\"context_length\":2}","model":{"architecture":"fedrt-tiny","weights_sha256":"abababababababababababababababababababababababababababababababab","context_dim":8,"feature_dim":4},"classes":["cat"],"training":{"local_epochs":1,"batch_size":32,"optimizer":{"name":"sgd","learning_rate":0.002,"momentum":0.9,"weight_decay":0.0005},"schedule":"constant","precision":"fp32","views":0},"round_count":2,"evaluation":{"splits":["personal"],"novel_classes":[]},"seed":7},"rounds":{"count":2,"time_limit":100.0,"min_results":null,"max_silos":null,"silos":["north","south"],"on_too_few":"fail","retries":2},"evaluation":{"every":0}},"schema_sha256":"5f5805c78039fc73186700ec188c732d144a0673e60b0e01505d6f9667e4dd3f","create_time":1100.0,"stage":{"kind":"evaluate","number":2,"attempt":0,"kept":[]},"stage_time":1112.0,"shares":true,"state":"succeeded","message":"","round":null,"end_time":1122.0}');
INSERT INTO "experiments" VALUES('cancelled','cancelled',1222.0,'{"experiment_id":"cancelled","spec":{"local":{"method_name":"promptfl","hyperparameters_json":"{\"context_init\":null,\"context_length\":2}","model":{"architecture":"fedrt-tiny","weights_sha256":"abababababababababababababababababababababababababababababababab","context_dim":8,"feature_dim":4},"classes":["cat"],"training":{"local_epochs":1,"batch_size":32,"optimizer":{"name":"sgd","learning_rate":0.002,"momentum":0.9,"weight_decay":0.0005},"schedule":"constant","precision":"fp32","views":0},"round_count":2,"evaluation":{"splits":["personal"],"novel_classes":[]},"seed":7},"rounds":{"count":2,"time_limit":100.0,"min_results":null,"max_silos":null,"silos":["north","south"],"on_too_few":"fail","retries":2},"evaluation":{"every":0}},"schema_sha256":"5f5805c78039fc73186700ec188c732d144a0673e60b0e01505d6f9667e4dd3f","create_time":1222.0,"stage":{"kind":"train","number":1,"attempt":0,"kept":[]},"stage_time":1222.0,"shares":true,"state":"cancelled","message":"cancelled by an operator","round":null,"end_time":1228.0}');
INSERT INTO "experiments" VALUES('active','running',1328.0,'{"experiment_id":"active","spec":{"local":{"method_name":"promptfl","hyperparameters_json":"{\"context_init\":null,\"context_length\":2}","model":{"architecture":"fedrt-tiny","weights_sha256":"abababababababababababababababababababababababababababababababab","context_dim":8,"feature_dim":4},"classes":["cat"],"training":{"local_epochs":1,"batch_size":32,"optimizer":{"name":"sgd","learning_rate":0.002,"momentum":0.9,"weight_decay":0.0005},"schedule":"constant","precision":"fp32","views":0},"round_count":2,"evaluation":{"splits":["personal"],"novel_classes":[]},"seed":7},"rounds":{"count":2,"time_limit":100.0,"min_results":null,"max_silos":null,"silos":["north","south"],"on_too_few":"fail","retries":2},"evaluation":{"every":0}},"schema_sha256":"5f5805c78039fc73186700ec188c732d144a0673e60b0e01505d6f9667e4dd3f","create_time":1328.0,"stage":{"kind":"train","number":1,"attempt":0,"kept":[]},"stage_time":1328.0,"shares":true,"state":"running","message":"","round":{"number":1,"kind":"train","attempt":0,"asks":[{"silo_id":"north","task_id":"active/1/train/north","state":"returned","message":"","reoffer_time":null},{"silo_id":"south","task_id":"active/1/train/south","state":"offered","message":"","reoffer_time":null}],"needed":2,"begin_time":1328.0,"deadline":1428.0,"aggregates":true,"absent":[],"phase":"collecting","succeeded":false,"lost_time":null,"message":""},"end_time":null}');
INSERT INTO "experiments" VALUES('pending','pending',1379.0,'{"experiment_id":"pending","spec":{"local":{"method_name":"promptfl","hyperparameters_json":"{\"context_init\":null,\"context_length\":2}","model":{"architecture":"fedrt-tiny","weights_sha256":"abababababababababababababababababababababababababababababababab","context_dim":8,"feature_dim":4},"classes":["cat"],"training":{"local_epochs":1,"batch_size":32,"optimizer":{"name":"sgd","learning_rate":0.002,"momentum":0.9,"weight_decay":0.0005},"schedule":"constant","precision":"fp32","views":0},"round_count":1,"evaluation":{"splits":["personal"],"novel_classes":[]},"seed":1},"rounds":{"count":1,"time_limit":100.0,"min_results":null,"max_silos":null,"silos":["north","west"],"on_too_few":"fail","retries":2},"evaluation":{"every":1}},"schema_sha256":"5f5805c78039fc73186700ec188c732d144a0673e60b0e01505d6f9667e4dd3f","create_time":1379.0,"stage":{"kind":"evaluate","number":0,"attempt":0,"kept":[]},"stage_time":1379.0,"shares":true,"state":"pending","message":"","round":null,"end_time":null}');
CREATE TABLE silos (
	silo_id VARCHAR(63) NOT NULL, 
	document TEXT NOT NULL, 
	PRIMARY KEY (silo_id)
);
INSERT INTO "silos" VALUES('north','{"silo_id":"north","software_version":"0.4.0","device":"cpu","methods":["promptfl"],"last_seen_time":999.0,"connected":true,"draining":false}');
INSERT INTO "silos" VALUES('south','{"silo_id":"south","software_version":"0.4.0","device":"cpu","methods":["promptfl"],"last_seen_time":999.0,"connected":true,"draining":false}');
CREATE TABLE tasks (
	task_id VARCHAR(200) NOT NULL, 
	experiment_id VARCHAR(63) NOT NULL, 
	round_number INTEGER NOT NULL, 
	document TEXT NOT NULL, 
	PRIMARY KEY (task_id)
);
INSERT INTO "tasks" VALUES('done/1/train/north','done',1,'{"task_id":"done/1/train/north","experiment_id":"done","silo_id":"north","round_number":1,"kind":"train","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.5},"work_duration":1.5,"tensors":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"e867e3bcd86c436421da98b259dbde6a6aec42bdea756d25e98c4973b3611558"}}');
INSERT INTO "tasks" VALUES('done/1/train/south','done',1,'{"task_id":"done/1/train/south","experiment_id":"done","silo_id":"south","round_number":1,"kind":"train","attempt":0,"verdict":"accepted","message":"","example_count":11,"metrics":{"loss":0.5},"work_duration":1.5,"tensors":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"26ba44a66ca6559c6b8c9e2540741d236386d2f0bc84faaf7fd70c73f4b33dfc"}}');
INSERT INTO "tasks" VALUES('done/2/train/north','done',2,'{"task_id":"done/2/train/north","experiment_id":"done","silo_id":"north","round_number":2,"kind":"train","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.4},"work_duration":1.0,"tensors":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"6a7bb757331ba0a922aeba771882f599e095b72846cd061a3c0c74f786d4f41e"}}');
INSERT INTO "tasks" VALUES('done/2/train/south','done',2,'{"task_id":"done/2/train/south","experiment_id":"done","silo_id":"south","round_number":2,"kind":"train","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.4},"work_duration":1.0,"tensors":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"bbbb02687df576b7500a736e426f4d972ad168ffd1bf8e4f5cae30c286c10785"}}');
INSERT INTO "tasks" VALUES('done/2/evaluate/north','done',2,'{"task_id":"done/2/evaluate/north","experiment_id":"done","silo_id":"north","round_number":2,"kind":"evaluate","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.4},"work_duration":1.0,"tensors":null}');
INSERT INTO "tasks" VALUES('done/2/evaluate/south','done',2,'{"task_id":"done/2/evaluate/south","experiment_id":"done","silo_id":"south","round_number":2,"kind":"evaluate","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.4},"work_duration":1.0,"tensors":null}');
INSERT INTO "tasks" VALUES('cancelled/1/train/north','cancelled',1,'{"task_id":"cancelled/1/train/north","experiment_id":"cancelled","silo_id":"north","round_number":1,"kind":"train","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.5},"work_duration":1.5,"tensors":{"headers":[{"name":"context","element_type":"<f4","shape":[262145]}],"sha256":"af44da91369e453059e36873ca3b5f2fecd3d7b30553b177302d6fcd4454ccac"}}');
INSERT INTO "tasks" VALUES('cancelled/1/train/south','cancelled',1,'{"task_id":"cancelled/1/train/south","experiment_id":"cancelled","silo_id":"south","round_number":1,"kind":"train","attempt":0,"verdict":"late","message":"cancelled by an operator","example_count":0,"metrics":{},"work_duration":0.0,"tensors":null}');
INSERT INTO "tasks" VALUES('active/1/train/north','active',1,'{"task_id":"active/1/train/north","experiment_id":"active","silo_id":"north","round_number":1,"kind":"train","attempt":0,"verdict":"accepted","message":"","example_count":10,"metrics":{"loss":0.5},"work_duration":1.5,"tensors":{"headers":[{"name":"context","element_type":"<f4","shape":[2,8]}],"sha256":"2cf10a34ccb9f616c70fea4e405e1d651802ffccb3fbbb80b72420afeb693e58"}}');
INSERT INTO "tasks" VALUES('active/1/train/south','active',1,'{"task_id":"active/1/train/south","experiment_id":"active","silo_id":"south","round_number":1,"kind":"train","attempt":0,"verdict":null,"message":"","example_count":0,"metrics":{},"work_duration":0.0,"tensors":null}');
CREATE INDEX ix_experiments_state ON experiments (state);
CREATE INDEX ix_experiments_create_time ON experiments (create_time);
CREATE INDEX tasks_by_round ON tasks (experiment_id, round_number);
CREATE INDEX ix_events_experiment_id ON events (experiment_id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',17);
COMMIT;
PRAGMA user_version = 2;
